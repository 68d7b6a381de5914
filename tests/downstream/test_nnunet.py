"""nnU-Net goes on from our weights and sees our numbers: proven with its own code where there is some."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from support.other_side import python_of, run_there, with_nnunet
from support.pages import DOCS
from support.runs import SMALL, save_run
from support.sources import phantom_hu
from typer.testing import CliRunner

import maesil
from maesil.cache.provenance import record_uses, use_of
from maesil.cli import app
from maesil.config.presets import PRESETS
from maesil.config.schema import ModelConfig
from maesil.data.split import Split
from maesil.downstream.export import export_encoder
from maesil.downstream.nnunet import adaptation_plan, change_plan, ct_normalisation
from maesil.downstream.primus import SIZES, primus_state
from maesil.errors import UsageError
from maesil.models.encoders import encoder_of
from maesil.models.registry import make_model
from maesil.store.nifti import write_nifti
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.types import Intensity

PRIMUS = replace(SMALL, kind="primus", depth=2)
pytestmark = pytest.mark.usefixtures("one_thread")


def exported(folder: Path, model: ModelConfig = PRIMUS, spacing=(1.5, 1.5, 1.5)) -> Path:
    """A run of Primus that was trained at a spacing, exported for nnU-Net."""
    run = save_run(folder / "run", Split((), ()), model)
    store = Store.create(folder / "s", Recipe(spacing=spacing, superpatch=32), "0" * 16)
    record_uses(run, [use_of(store, None)])
    export_encoder(run, folder / "encoder", kind="nnunet")
    return folder / "encoder"


PLANS = {
    "dataset_name": "Dataset001_X", "plans_name": "ptPlans__m____Spacing__1.50_1.50_1.50___Norm__Z",
    "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
    "configurations": {
        "2d": {"data_identifier": "nnUNetPlans_2d", "normalization_schemes": ["CTNormalization"],
               "use_mask_for_norm": [False], "spacing": [1.5, 1.5], "patch_size": [64, 64]},
        "3d_fullres": {"data_identifier": "Spacing__1.50_1.50_1.50___Norm__Z", "use_mask_for_norm": [False],
                       "normalization_schemes": ["ZScoreNormalization"], "spacing": [1.5, 1.5, 1.5],
                       "patch_size": [32, 32, 32], "batch_size": 2},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    },
    "foreground_intensity_properties_per_channel": {
        "0": {"max": 3000.0, "mean": 40.0, "median": 45.0, "min": -1024.0, "percentile_00_5": -900.0,
              "percentile_99_5": 900.0, "std": 200.0},
    },
    "something_of_theirs": {"kept": True},
}  # fmt: skip


@pytest.fixture
def plans(tmp_path) -> Path:
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(PLANS))
    return path


def test_a_checkpoint_has_our_weights_and_what_nnu_net_reads(tmp_path):
    folder = exported(tmp_path)
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    state = primus_state(maesil.load_encoder(folder).net)
    assert checkpoint["network_weights"].keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in checkpoint["network_weights"].items())
    plan = checkpoint["nnssl_adaptation_plan"]
    assert plan == json.loads((folder / "adaptation_plan.json").read_text())
    assert plan["pretrain_plan"]["configurations"]["3d_fullres"]["spacing"] == [1.5, 1.5, 1.5]
    for key in ("key_to_encoder", "key_to_stem", "key_to_lpe"):
        assert any(name.startswith(plan[key]) for name in state)
    assert all(f"{name}.weight" in state for name in plan["keys_to_in_proj"])
    assert {"MAESIL", "Primus"} <= {one["name"] for one in checkpoint["citations"]}
    # Exported again without nnU-Net, nothing of the old weights stays.
    export_encoder(tmp_path / "run", folder, force=True)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}


def test_the_sizes_that_nnu_net_knows_go_by_their_names():
    for name, preset in PRESETS.items():
        if preset.model.kind == "primus":
            with torch.device("meta"):
                encoder = encoder_of(make_model(replace(preset.model, crop=32)), Intensity())
            architecture = adaptation_plan(encoder, None)["architecture_plans"]
            assert (
                architecture["arch_class_name"] == f"Primus{name[-1].upper()}" and architecture["arch_kwargs"] is None
            )
    assert len(SIZES) == 4


def test_other_encoders_are_refused_before_anything_is_written(tmp_path):
    run = save_run(tmp_path / "run", Split((), ()))
    other = save_run(tmp_path / "r", Split((), ()), replace(PRIMUS, registers=2))
    for given, told in ((run, "expected an encoder of kind primus, found maesil"), (other, "model.registers=2")):
        with pytest.raises(UsageError, match=told):
            export_encoder(given, tmp_path / "encoder", kind="nnunet")
        assert not (tmp_path / "encoder").exists()
    with pytest.raises(UsageError, match="nnssl: no such format"):
        export_encoder(run, tmp_path / "encoder", kind="nnssl")


def test_clipping_and_two_numbers_are_our_normalisation():
    intensity = Intensity((-900.0, 700.0), 0.4, 0.3)
    numbers = ct_normalisation(intensity)
    hu = np.arange(-2000, 3000, dtype=np.float64)
    clipped = np.clip(hu, numbers["percentile_00_5"], numbers["percentile_99_5"])
    ours = ((np.clip(hu, -900, 700) + 900) / 1600 - 0.4) / 0.3
    np.testing.assert_allclose((clipped - numbers["mean"]) / numbers["std"], ours, atol=1e-12)


def test_a_plan_gets_our_numbers_and_keeps_all_else(tmp_path, plans):
    folder = exported(tmp_path)
    given = ["nnunet-plan", str(plans), "--encoder", str(folder)]
    told = CliRunner().invoke(app, given)
    assert told.exit_code == 0, told.output
    changed = json.loads(plans.read_text())
    numbers = {"mean": -200.0, "std": 600.0, "percentile_00_5": -1000.0, "percentile_99_5": 1000.0}
    expected = copy.deepcopy(PLANS)
    expected["foreground_intensity_properties_per_channel"]["0"] |= numbers
    for name in ("2d", "3d_fullres"):
        found = changed["configurations"][name]["data_identifier"]
        assert found not in json.dumps(PLANS) and f"configurations.{name}.data_identifier: " in told.stdout
        expected["configurations"][name] |= {"data_identifier": found, "normalization_schemes": ["CTNormalization"]}
    assert changed == expected
    assert (
        "configurations.3d_fullres.normalization_schemes: ['ZScoreNormalization'] -> ['CTNormalization']" in told.stdout
    )
    assert "-plans_name plans -c 2d 3d_fullres" in told.stdout and not told.stderr
    before = plans.read_bytes()
    again = CliRunner().invoke(app, given)
    assert again.exit_code == 0 and "nothing to change" in again.stdout and plans.read_bytes() == before
    # Other numbers, another folder of preprocessed data.
    encoder = maesil.load_encoder(folder).net
    encoder.intensity = Intensity((-1000.0, 1000.0), 0.41, 0.3)
    assert len(change_plan(plans, encoder, (1.5, 1.5, 1.5)).changes) == 3


def test_what_is_not_as_in_pre_training_is_said(tmp_path, plans):
    document = json.loads(plans.read_text())
    document["configurations"]["3d_fullres"] |= {"spacing": [2.0, 1.0, 1.0], "patch_size": [48, 48, 48]}
    plans.write_text(json.dumps(document))
    told = CliRunner().invoke(app, ["nnunet-plan", str(plans), "--encoder", str(exported(tmp_path))])
    assert "spacing of [2.0, 1.0, 1.0] mm, the encoder learnt at [1.5, 1.5, 1.5]" in told.stderr
    assert "patches of [48, 48, 48] voxels, the encoder learnt on 32" in told.stderr


BROKEN = {
    "no plan": lambda p: p.pop("plans_name"),
    "two channels": lambda p: p["foreground_intensity_properties_per_channel"].update({"1": {}}),
    "turned axes": lambda p: p.update(transpose_forward=[2, 0, 1]),
    "masked": lambda p: p["configurations"]["3d_fullres"].update(use_mask_for_norm=[True]),
    "two normalisations": lambda p: p["configurations"]["2d"].update(normalization_schemes=["A", "B"]),
    "no identifier": lambda p: p["configurations"]["3d_fullres"].pop("data_identifier"),
    "no 3d_fullres": lambda p: p["configurations"].pop("3d_fullres"),
    "a list": lambda p: p.update(configurations=[]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_plan_that_is_not_understood_is_refused_and_left(tmp_path, plans, name):
    document = json.loads(plans.read_text())
    BROKEN[name](document)
    plans.write_text(json.dumps(document))
    before = plans.read_bytes()
    told = CliRunner().invoke(app, ["nnunet-plan", str(plans), "--encoder", str(exported(tmp_path))])
    assert told.exit_code == 2 and len(told.stderr.splitlines()) == 1 and "expected" in told.stderr
    assert plans.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[1]", "no json", None])
def test_what_is_no_plans_file_is_one_line(tmp_path, text):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match="expected a plans file of nnU-Net"):
        change_plan(path, maesil.load_encoder(exported(tmp_path)).net, None)


def dataset(raw: Path) -> Path:
    """Six small scans and their labels as nnU-Net wants them, axes as in a store."""
    folder = raw / "Dataset001_Phantom"
    grid = np.diag([0.0, 0.0, 0.0, 1.0])
    grid[2, 0] = grid[1, 1] = grid[0, 2] = 1.5
    rng = np.random.default_rng(0)
    for number in range(6):
        hu = np.pad(phantom_hu(3.0 * number), [(8, 8), (4, 4), (4, 4)], constant_values=-1000)
        hu = np.clip(np.rint(hu + rng.normal(0, 5, hu.shape)), -1024, 3071).astype(np.int16)
        label = ((hu > -300) & (hu < 300)).astype(np.int16)
        write_nifti(folder / "imagesTr" / f"case_{number}_0000.nii.gz", hu, grid)
        write_nifti(folder / "labelsTr" / f"case_{number}.nii.gz", label, grid)
    document = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "soft": 1}, "numTraining": 6,
                "file_ending": ".nii.gz"}  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


TRAIN = """
import functools, sys, torch
from nnunetv2.training.nnUNetTrainer.pretraining import thrp_primusx_finetuning as module
from nnunetv2.run.run_training_from_pretrained import train_pretrained

Trainer = module.PretrainedTrainer_Primusx
begin, initialize = Trainer.__init__, Trainer.initialize

@functools.wraps(begin)
def short(self, *given, **named):
    begin(self, *given, **named)
    self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

def kept(self):
    initialize(self)
    name = "pretrained" if self.use_pretrained_weights else "from_scratch"
    torch.save({{key: value.clone() for key, value in self.network.state_dict().items()}}, name + ".pt")

Trainer.__init__, Trainer.initialize = short, kept
if __name__ == "__main__":
    torch.set_num_threads(1)
    train_pretrained("1", "3d_fullres", 0, "PretrainedTrainer_Primusx", "{plans}", {scratch},
                     device=torch.device("cpu"))
"""
COMMAND = "import sys; from {module} import {entry} as run; sys.argv = {words!r}; run()"


def command(folder: Path, environment: dict[str, str], module: str, entry: str, *words: object) -> str:
    """One of nnU-Net's commands, by its entry point."""
    given = [entry, *map(str, words)]
    guarded = f"if __name__ == '__main__':\n    {COMMAND.format(module=f'nnunetv2.{module}', entry=entry, words=given)}"
    return run_there(guarded, folder, **environment)


def test_another_snapshot_than_the_one_that_is_tested_is_refused(tmp_path):
    (tmp_path / "nnunetv2").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'nnunetv2'\n")
    with pytest.raises(ValueError, match="expected the code of nnU-Net at 0e495086, found another"):
        python_of(tmp_path)


@with_nnunet
@pytest.mark.slow
def test_nnu_net_plans_preprocesses_and_trains_from_our_weights(tmp_path):
    """Its own code at commit 0e495086, on six phantoms: one short epoch, from our weights and from scratch."""
    folder, raw = exported(tmp_path), tmp_path / "raw"
    data, preprocessed = dataset(raw), tmp_path / "preprocessed" / "Dataset001_Phantom"
    known = {"nnUNet_raw": str(raw), "nnUNet_preprocessed": str(tmp_path / "preprocessed"), "nnUNet_n_proc_DA": "1",
             "nnUNet_results": str(tmp_path / "results"), "nnUNet_compile": "f"}  # fmt: skip
    entries = "experiment_planning.plan_and_preprocess_entrypoints"
    command(tmp_path, known, entries, "extract_fingerprint_entry", "-d", 1, "-np", 1)
    command(tmp_path, known, entries, "plan_experiment_entry", "-d", 1)
    command(
        tmp_path, known, "experiment_planning.like_nnssl", "preprocess_like_nnssl_entrypoint", "-d", 1, "-n", "maesil",
        "-pc", folder / "checkpoint_final.pth", "-am", "like_pretrained", "-np", 1,
    )  # fmt: skip
    (plans,) = preprocessed.glob("ptPlans__maesil*.json")
    told = CliRunner().invoke(app, ["nnunet-plan", str(plans), "--encoder", str(folder)])
    assert told.exit_code == 0 and not told.stderr and "ZScoreNormalization" in told.stdout, told.output
    command(
        tmp_path, known, entries, "preprocess_entry", "-d", 1, "-plans_name", plans.stem, "-c", "3d_fullres", "-np", 1
    )

    # Every voxel is what our encoder sees of it: nothing was resampled.
    identifier = json.loads(plans.read_text())["configurations"]["3d_fullres"]["data_identifier"]
    there = (
        "import numpy as np\nfrom nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2\n"
        f"data = nnUNetDatasetBlosc2({str(preprocessed / identifier)!r}).load_case('case_2')[0]\n"
        "np.save('there.npy', np.asarray(data[:]))\n"
    )
    run_there(there, tmp_path, **known)
    hu = sitk.GetArrayFromImage(sitk.ReadImage(data / "imagesTr" / "case_2_0000.nii.gz"))
    read = maesil.read_ct(data / "imagesTr" / "case_2_0000.nii.gz", 1.5)
    np.testing.assert_array_equal(read.hu, hu)
    seen = maesil.load_encoder(folder).net.patches(torch.from_numpy(read.hu)[None])[0]
    z, y, x = (n // 8 for n in read.shape)
    seen = seen.view(z, y, x, 8, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(read.shape)
    np.testing.assert_allclose(np.load(tmp_path / "there.npy")[0], seen.numpy(), rtol=0, atol=1e-4)

    # Training starts from our weights, tensor by tensor, and its twin does not.
    weights = primus_state(maesil.load_encoder(folder).net)
    for scratch, name in ((False, "pretrained"), (True, "from_scratch")):
        (tmp_path / "train.py").write_text(TRAIN.format(plans=plans.stem, scratch=scratch))
        log = run_there("import runpy; runpy.run_path('train.py', run_name='__main__')", tmp_path, **known)
        start = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        equal = {key: torch.equal(start[key], value) for key, value in weights.items()}
        assert set(weights) <= set(start) and "Epoch 0" in log
        assert all(equal.values()) if not scratch else not equal["eva.blocks.0.attn.q_proj.weight"]
        assert "2604.00514" in log or scratch
    checkpoints = sorted(path.parent.parent.name for path in (tmp_path / "results").rglob("checkpoint_final.pth"))
    assert len(checkpoints) == 2 and "from_scratch" in checkpoints[1]


def test_the_page_has_every_command_of_the_route():
    page = (DOCS / "how-to" / "nnunet.md").read_text(encoding="utf-8")
    for words in (
        "maesil train", "maesil export", "--format nnunet", "nnUNetv2_extract_fingerprint", "nnUNetv2_plan_experiment",
        "nnUNetv2_preprocess_like_nnssl", "maesil nnunet-plan", "nnUNetv2_preprocess ", "nnUNetv2_train_pretrained",
        "--from_scratch",
    ):  # fmt: skip
        assert words in page
