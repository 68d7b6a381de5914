"""A MONAI bundle gives the encoder's tokens by MONAI alone: its own loader, its own run, maesil out of reach."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from support.runs import SMALL, save_run

from maesil.data.split import Split
from maesil.downstream.bundle import BUNDLE, inference, value_range
from maesil.downstream.card import read_card
from maesil.downstream.export import export_encoder, load_net
from maesil.store.recipe import Recipe
from maesil.types import Intensity

SPLIT = Split(("a" * 32,), ("b" * 32,))
OBLONG = replace(SMALL, kind="primus", depth=1, crop=(16, 32, 24), patch=(4, 8, 8))
MANDATORY = (
    "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors", "copyright",
    "network_data_format",
)  # fmt: skip
OF_A_TENSOR = (
    "type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data",
    "channel_def",
)  # fmt: skip
MONAI_ALONE = """
import sys
sys.modules['maesil'] = None  # importing it raises
import monai.bundle
import torch
files = {'config_file': 'configs/inference.json', 'meta_file': 'configs/metadata.json'}
monai.bundle.run(**files, dataset_dir='../scans', output_dir='../out', device='cpu')
monai.bundle.verify_net_in_out('network', **files, device='cpu')
network = monai.bundle.load('encoder', bundle_dir='..', workflow_type='inference', device='cpu')
network(torch.zeros(1, 1, 24, 32, 16)).sum().backward()
assert any(weight.grad is not None and weight.grad.any() for weight in network.parameters())
assert not [name for name in sys.modules if name.startswith('maesil.')]
"""
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle, and one scan as large as a crop whose axes point to the right, the front and the head."""
    folder = tmp_path_factory.mktemp("bundle")
    export_encoder(save_run(folder / "run", SPLIT, OBLONG), folder / "encoder", kind="monai-bundle", licence="CC0-1.0")
    volume_ZYX = np.random.default_rng(0).integers(-1300, 1600, OBLONG.crop_zyx, dtype=np.int16)
    np.save(folder / "volume.npy", volume_ZYX)
    (folder / "scans").mkdir()
    turned_XYZ = np.ascontiguousarray(volume_ZYX.T[::-1, ::-1])
    nibabel.save(nibabel.Nifti1Image(turned_XYZ, np.diag([2.0, 2.0, 3.0, 1.0])), folder / "scans" / "one.nii.gz")
    return folder


def test_the_files_are_those_of_the_specification(folder):
    bundle = folder / "encoder"
    assert all((bundle / name).is_file() for name in BUNDLE)
    found = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert set(MANDATORY) <= set(found) and found["copyright"] == "CC0-1.0"
    image, pred = found["network_data_format"]["inputs"]["image"], found["network_data_format"]["outputs"]["pred"]
    assert set(OF_A_TENSOR) <= set(image) & set(pred)
    assert image["spatial_shape"] == [24, 32, 16] and pred["spatial_shape"] == [3, 4, 4]
    assert image["value_range"] == pytest.approx([-4 / 3, 2]) and pred["num_channels"] == len(pred["channel_def"]) == 48
    assert (bundle / "LICENSE").read_text() == "CC0-1.0\n"
    for path in bundle.rglob("*.*"):
        assert path.is_dir() or (b"a" * 32 not in path.read_bytes() and str(folder).encode() not in path.read_bytes())


@pytest.mark.slow
def test_monai_runs_it_without_maesil_and_gives_the_tokens(folder):
    (folder / "script.py").write_text(MONAI_ALONE)
    done = subprocess.run(
        [sys.executable, "../script.py"], cwd=folder / "encoder", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grid = nibabel.load(folder / "out" / "one_tokens.nii.gz")
    found = torch.from_numpy(grid.get_fdata(dtype=np.float32)).permute(2, 1, 0, 3)
    volume = torch.from_numpy(np.load(folder / "volume.npy"))
    with torch.no_grad():
        wanted = load_net(folder / "encoder")(volume[None])[0].view(4, 4, 3, 48)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # To the left and the back from the last voxel of the file; a patch of 8 begins half of 7 voxels before its centre.
    affine = [[-16.0, 0, 0, 46 - 7], [0, -16, 0, 62 - 7], [0, 0, 12, 4.5], [0, 0, 0, 1]]
    np.testing.assert_allclose(grid.affine, affine, atol=1e-4)
    tissue = torch.nn.functional.avg_pool3d((volume > -500).float()[None], OBLONG.patch_zyx)[0, ..., None]
    ((_, *row),) = csv.reader((folder / "out" / "vectors.csv").read_text().splitlines())
    mean = (wanted * tissue).sum((0, 1, 2)) / tissue.sum()
    np.testing.assert_allclose(np.array(row, float), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:NvImgCodec")  # MONAI makes all its readers, whichever is named
def test_monai_s_transforms_bring_a_scan_to_the_spacing_and_to_whole_patches(folder):
    encoder, card = load_net(folder / "encoder"), read_card(folder / "encoder")
    config = inference(encoder, replace(card, recipes=(Recipe(spacing=(3.0, 2.5, 2.0)),)))
    from monai.bundle import ConfigParser  # takes seconds

    parser = ConfigParser(config)
    image = parser.get_parsed_content("preprocessing")({"image": folder / "scans" / "one.nii.gz"})["image"]
    assert image.pixdim.tolist() == pytest.approx([2.0, 2.5, 3.0])
    assert image.shape == (1, 24, 32, 16)  # 24, 26 and 16 voxels, and air
    low, high = value_range(encoder.intensity)
    assert image.min() == pytest.approx(low) and image.max() <= high + 1e-6
    assert (image[:, :, 26:] == low).all()
    spacings = [one for one in inference(encoder, card)["preprocessing"]["transforms"] if one["_target_"] == "Spacingd"]
    assert spacings == []  # nobody knows the spacing of this run


def test_windows_begin_with_a_patch(folder):
    encoder, card = load_net(folder / "encoder"), read_card(folder / "encoder")
    inferer = inference(encoder, card)["windows"]
    steps = [int(edge * (1 - overlap)) for edge, overlap in zip(inferer["roi_size"], inferer["overlap"], strict=True)]
    assert inferer["roi_size"] == [24, 32, 16] and steps == [8, 16, 8]


def test_the_ends_of_the_window_are_what_the_encoder_sees():
    assert value_range(Intensity((-1000.0, 1000.0), 0.4, 0.3)) == pytest.approx((-4 / 3, 2.0))
