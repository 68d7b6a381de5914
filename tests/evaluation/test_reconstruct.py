"""Whole volumes reconstructed from real stores: what a voxel's prediction may know, seams, and files."""

from __future__ import annotations

import math
from itertools import pairwise, product

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import SMALL, save_run
from support.stores import add_volume, make_store, synthetic_hu
from typer.testing import CliRunner

from maesil.cli import app
from maesil.config.schema import MaskConfig, ModelConfig, RunConfig
from maesil.data.split import Split
from maesil.errors import StoreError, UsageError
from maesil.evaluation.metrics import region_voxels
from maesil.evaluation.predict import ModelPredictor
from maesil.evaluation.reconstruct import (
    blending_weights,
    overlapping_origins,
    predict_while_hidden,
    reconstruct_volume,
)
from maesil.geometry import to_nifti
from maesil.models.patches import expand_cells
from maesil.store.nifti import export_volume
from maesil.store.reader import SuperpatchReader
from maesil.training.checkpoint import load_run

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHAPE = (40, 52, 45)
KINDS = {
    "maesil": SMALL,
    "mae2d": ModelConfig(kind="mae2d", crop=32, width=16, depth=1, decoder_width=16),
    "ae": ModelConfig(kind="ae", crop=32, channels=4, latent=8),
    "vae": ModelConfig(kind="vae", crop=32, channels=4, latent=8),
    "vqvae": ModelConfig(kind="vqvae", crop=32, channels=4, latent=8, codes=8),
}


@given(
    shape=st.tuples(*[st.integers(1, 200)] * 3),
    crop=st.sampled_from([16, 24, 32, 64]),
)
@settings(max_examples=30, deadline=None)
def test_crops_overlap_by_half_and_leave_nothing_out(shape, crop):
    origins = overlapping_origins(shape, crop)
    assert len(set(origins)) == len(origins)
    for axis, size in enumerate(shape):
        starts = sorted({origin[axis] for origin in origins})
        assert starts[0] == 0 and starts[-1] + crop >= size
        assert starts[-1] == 0 or starts[-1] + crop < size + 8
        assert all(b - a <= crop / 2 and a % 8 == 0 for a, b in pairwise(starts))


@pytest.mark.parametrize("crop", [16, 64])
def test_blending_weights_of_overlapping_crops_add_up_to_one_and_vanish_at_faces(crop):
    weights, half = blending_weights(crop), crop // 2
    corners = [weights[z : z + half, y : y + half, x : x + half] for z, y, x in product((0, half), repeat=3)]
    torch.testing.assert_close(sum(corners), torch.ones(half, half, half))
    assert weights[0].max() < 0.01 and (weights > 0).all() and weights[half, half, half] > 0.9


class _Echo:
    """Predicts each voxel's own HU where hidden, and nonsense where visible, which must never be used."""

    name = "echo"

    def predict_hu(self, volume_BZYX, masks, valid_BZYX=None):
        hidden = expand_cells(masks.mask.view(-1, *SMALL.grid) > 0, SMALL.patch)
        return torch.where(hidden, volume_BZYX.float(), 9e9)


class _FirstVoxel:
    """Predicts one number a crop, the crop's first voxel: crops that could not be more apart at their seams."""

    name = "first voxel"

    def predict_hu(self, volume_BZYX, masks, valid_BZYX=None):
        return volume_BZYX[:, :1, :1, :1].float().expand(volume_BZYX.shape)


def test_predictions_of_hidden_voxels_alone_end_up_where_they_belong(tmp_path):
    store = make_store(tmp_path / "store", [], superpatch=32)
    hu, valid = synthetic_hu(SHAPE, 3), np.ones(SHAPE, dtype=bool)
    valid[:16] = False
    volume = add_volume(store, hu, valid=valid)
    predicted = predict_while_hidden(SuperpatchReader(store), volume, _Echo(), RunConfig(SMALL), 0, CPU)
    assert predicted.passes == 2 and predicted.crops == len(overlapping_origins(SHAPE, 32))
    expected = np.where(valid, hu, -1024)
    np.testing.assert_allclose(predicted.hu_ZYX.numpy(), expected, atol=0.01)


def test_crops_that_disagree_leave_no_step_at_their_faces(tmp_path):
    store = make_store(tmp_path / "store", [], superpatch=32)
    corners = np.random.default_rng(0).integers(-900, 900, (8, 8, 8)).astype(np.int16)
    volume = add_volume(store, np.kron(corners, np.ones((16, 16, 16), dtype=np.int16)))
    predicted = predict_while_hidden(SuperpatchReader(store), volume, _FirstVoxel(), RunConfig(SMALL), 0, CPU).hu_ZYX
    for axis in range(3):
        steps = predicted.diff(dim=axis).abs().movedim(axis, 0).flatten(1).amax(dim=1)
        # Along 16 voxels of a cross-fade by sine squared no step is above pi / 2 / 16 of the difference: 1800 HU.
        assert steps.max() < 1800 * math.pi / 2 / 16


PATCH = (slice(16, 24), slice(24, 32), slice(16, 24))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of a volume and of its twin with one patch replaced by noise; the second one's group was trained on."""
    folder = tmp_path_factory.mktemp("reconstruct")
    store = make_store(folder / "store", [], superpatch=32)
    hu = synthetic_hu(SHAPE, 1)
    changed = hu.copy()
    changed[PATCH] = np.random.default_rng(0).integers(-1000, 1000, (8, 8, 8))
    body = hu > -950
    twins = add_volume(store, hu, name="twin", body=body), add_volume(store, changed, name="changed", body=body)
    return folder, store, twins


# A slice model needs layers that hide alike; convolutions treat all masks alike, so two are enough for them.
MASKS = {"maesil": ("dual", "random", "tube", "slab"), "mae2d": ("dual", "tube"), "ae": ("dual", "slab")}


@pytest.mark.parametrize("kind, mask", [(kind, mask) for kind in KINDS for mask in MASKS.get(kind, ("dual",))])
def test_no_voxel_is_predicted_from_itself(world, tmp_path, kind, mask, monkeypatch):
    """Another patch in its place changes the prediction around it, and to the bit nothing at it."""
    _, store, (twin, changed) = world
    run = load_run(save_run(tmp_path / "run", Split(train=(), validation=()), KINDS[kind], MaskConfig(kind=mask)))
    if kind == "vqvae":  # an untrained codebook is empty
        torch.nn.init.normal_(run.model.codebook_Kc, generator=torch.Generator().manual_seed(0))
    reader, predictor = SuperpatchReader(store), ModelPredictor(run.model, run.intensity)
    monkeypatch.setattr(
        "maesil.evaluation.reconstruct.mask_seed", lambda seed, volume_id, origin: sum(origin)
    )  # alike for both
    first, second = (
        predict_while_hidden(reader, volume, predictor, run.config, 0, CPU).hu_ZYX for volume in (twin, changed)
    )
    assert torch.equal(first[PATCH], second[PATCH])
    assert not torch.equal(first, second)


def test_files_lie_where_the_patient_lay_and_the_score_is_of_what_is_in_them(world, tmp_path):
    folder, store, (twin, _) = world
    run = save_run(tmp_path / "run", Split(train=(twin.group,), validation=()))
    words = ["reconstruct", run, folder / "store", twin.volume_id[:10], "--out", tmp_path / "out", "--device", "cpu"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    score, how, trained, *paths = result.stdout.splitlines()
    assert "12 crops under 2 complementary dual masks" in how and "was trained on this patient" in trained
    names = [f"{twin.volume_id}_{name}" for name in ("original.nii.gz", "reconstruction.nii.gz", "planes.png")]
    assert paths == [str(tmp_path / "out" / name) for name in names]

    reader = SuperpatchReader(store)
    original, reconstruction = (nib.load(path) for path in paths[:2])
    for image in (original, reconstruction):
        np.testing.assert_allclose(image.affine, to_nifti(twin.affine))
        assert image.get_data_dtype() == np.int16 and image.shape == SHAPE[::-1]
    exported = nib.load(export_volume(reader, twin.volume_id, tmp_path / "export"))
    np.testing.assert_array_equal(np.asarray(original.dataobj), np.asarray(exported.dataobj))

    a, b = (np.asarray(image.dataobj).T.astype(np.float64).clip(-1000, 1000) for image in (original, reconstruction))
    maps = (torch.from_numpy(reader.read_map(twin.volume_id, name)) for name in ("valid", "body"))
    body = region_voxels(*maps, SHAPE)["body"].numpy()
    psnr = 10 * np.log10(2000**2 / ((a - b)[body] ** 2).mean())
    assert score == f"PSNR {psnr:.2f} dB over the valid voxels of the body, window -1000 to 1000 HU"


def test_the_same_seed_gives_the_same_bytes_and_a_run_without_masks_says_so(world, tmp_path):
    folder, _, (twin, _) = world
    run = save_run(tmp_path / "run", Split(train=(), validation=()), KINDS["ae"], MaskConfig(kind="none"))
    first, again = (
        reconstruct_volume(run, folder / "store", twin.volume_id, out=tmp_path / name, device="cpu") for name in "ab"
    )
    assert first.reconstruction.read_bytes()[10:] == again.reconstruction.read_bytes()[10:]  # but for gzip's time stamp
    assert first.picture.read_bytes() == again.picture.read_bytes()
    assert "the model saw every voxel" in first.notes[0]
    assert len(first.notes) == 2 and "keeps nothing to recognise its scans by" in first.notes[1]


def test_wrong_paths_end_in_one_clear_line(world, tmp_path):
    folder, _, (twin, _) = world
    run = save_run(tmp_path / "run", Split(train=(), validation=()))
    with pytest.raises(UsageError, match="expected one volume"):
        reconstruct_volume(run, folder / "store", "no such id", device="cpu")
    with pytest.raises(StoreError):
        reconstruct_volume(run, tmp_path / "nothing", twin.volume_id, device="cpu")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="expected a folder"):
        reconstruct_volume(run, folder / "store", twin.volume_id, out=tmp_path / "file", device="cpu")
