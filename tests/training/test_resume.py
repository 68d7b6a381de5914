"""What a resumed run may change: every option, one by one, in real runs."""

from __future__ import annotations

import inspect
import io
import re
import shutil
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch
from rich.console import Console
from support.lanes import slow_but
from support.runs import interrupted_after
from support.stores import make_store
from support.training import pictured

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.data.split import write_split
from maesil.errors import CheckpointError, UsageError
from maesil.training.checkpoint import content_sha256, load_run
from maesil.training.log import read_metrics
from maesil.training.optim import make_optimizer
from maesil.training.resume import ON_RESUME, restore_optimizer
from maesil.training.train import train

CONFIG = RunConfig(
    ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1),
    train=TrainConfig(
        steps=6, batch=2, checkpoint_every=1000, validate_every=5, validation_crops=2, device="cpu", threads=1,
        warmup=0.0, clip=0.5,
    ),
)  # fmt: skip
DONE = 3
"""Steps before the run is resumed."""

OTHER = {
    "model": {
        "kind": "ae", "crop": 32, "patch": 4, "width": 32, "depth": 2, "decoder_width": 32, "decoder_depth": 2,
        "decoder": "cross", "decoded": 0.5, "head": "overlap", "channels": 8, "latent": 64, "codes": 100,
        "penalty": 0.1, "picture_head": "none", "decorrelation": 0.2, "registers": 2,
    },
    "mask": {"kind": "random", "plane": 0.25, "axis": 0.25, "share": 0.5},
    "train": {
        "seed": 1, "steps": 8, "batch": 4, "accumulate": 2, "lr": 1e-3, "weight_decay": 0.5, "betas": (0.5, 0.6),
        "warmup": 0.9, "clip": 1e-3, "window": (-900.0, 1000.0), "min_body": 0.2, "thin": "pad", "offsets": "inside",
        "crops_per_visit": 4, "flips": "xy", "window_jitter": 0.1, "ema": 0.5, "minutes": 1.0, "compile": True,
        "where": "body > 0.2", "validation": 0.5, "validation_crops": 1, "log_every": 5, "validate_every": 4,
        "checkpoint_every": 1, "checkpoint_minutes": 1e-9, "keep_best": True, "picture_every": 5, "ram": "1GB",
        "stage": "stage", "stage_size": "1GB", "tracker": "mlflow",
        "device_resident": True, "readers": 1, "threads": 2, "activation_checkpointing": True,
        "device": "auto", "kernels": "reference", "optimizer": "adamw", "picture_head_every": 2,
    },
}  # fmt: skip
"""Another possible value of every option."""
SECTIONS = {section.name: getattr(CONFIG, section.name) for section in fields(RunConfig)}
OPTIONS = [f"{section}.{field.name}" for section, values in SECTIONS.items() for field in fields(values)]
CALL = ("stores", "weights", "split", "init_from", "profile", "mirror")
LEFT_OUT = {
    "train.compile": "minutes of a C++ compiler",
    "train.threads": "rounds otherwise",
    "train.device": "a GPU",
    "train.tracker": "a database that would stay; tests/training/test_trackers.py resumes with each",
    "train.stage": "a folder that would stay; tests/cli/test_object_stores.py trains with one",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    make_store(root / "store", [(32, 40, 36), (40, 32, 33), (32, 32, 48)], superpatch=32)
    interrupted_after(DONE, [root / "store"], CONFIG, root / "began")
    with pictured():
        train([root / "store"], CONFIG, root / "whole", console=quiet())  # without a break
    return root


def quiet():
    return Console(file=io.StringIO(), width=300)


def resumed(place, tmp_path, config=CONFIG, **options):
    out, console = shutil.copytree(place / "began", tmp_path / "run"), quiet()
    train([place / "store"], config, out, resume=True, console=console, **options)
    return out, console.file.getvalue()


def test_the_table_knows_every_option():
    configured = {*OPTIONS}
    call = set(inspect.signature(train).parameters) - {"config", "out", "resume", "console", "note"}
    assert set(ON_RESUME) == configured | call == configured | set(CALL)
    assert {f"{section}.{name}" for section, names in OTHER.items() for name in names} == configured


@pytest.mark.parametrize("name", [name for name in OPTIONS if ON_RESUME[name] == "refused"])
def test_another_value_is_refused_by_name(place, tmp_path, name):
    with pytest.raises((CheckpointError, UsageError), match=re.escape(name)):
        resumed(place, tmp_path, changed(name))
    if name != "model.registers":  # without a Primus refused by the configuration itself, before a run is looked at
        assert content_sha256(load_run(tmp_path / "run").last_weights) == weights(place / "began")


FREE = [name for name in OPTIONS if ON_RESUME[name] == "free" and name not in LEFT_OUT]
APPLIED = [name for name in OPTIONS if ON_RESUME[name] == "applied"]


@pytest.mark.parametrize("name", slow_but(FREE, ("train.ram", "train.readers")))
def test_what_is_free_leaves_the_losses(place, tmp_path, name):
    out, _ = resumed(place, tmp_path, changed(name))
    for column in ("loss", "validation_psnr"):
        found, expected = (
            [one.get(column) for one in read_metrics(run / "metrics.jsonl")] for run in (out, place / "whole")
        )
        assert found == [None if value is None else pytest.approx(value, rel=0, abs=0) for value in expected]


EFFECTS = {
    "steps": lambda out: len(records(out)),
    "validation_crops": lambda out: records(out)[-1]["validation_psnr"],
    "log_every": lambda out: [one["step"] for one in records(out)],
    "validate_every": lambda out: [one["step"] for one in records(out) if "validation_psnr" in one],
    "keep_best": lambda out: (out / "best" / "checkpoint.pt").exists(),
    "picture_every": lambda out: sorted(path.name for path in (out / "pictures").iterdir()),
}
"""Where the effect of an option shows; else in the weights."""


@pytest.mark.parametrize(
    "name", slow_but(APPLIED, ("train.lr", "train.validate_every", "train.checkpoint_every", "train.picture_every"))
)
def test_what_is_applied_has_an_effect_and_is_announced(place, tmp_path, name):
    if name in ("train.checkpoint_every", "train.checkpoint_minutes"):
        saved = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("maesil.training.trainer.Trainer.save", lambda trainer, out: saved.append(trainer.step))
            _, told = resumed(place, tmp_path, changed(name))
        assert saved == [4, 5, 6]
    else:
        with pictured() if name == "train.picture_every" else nullcontext():
            out, told = resumed(place, tmp_path, changed(name))
        effect = EFFECTS.get(name.removeprefix("train."), weights)
        assert effect(out) != effect(place / "whole")
    assert f"changed from step {DONE + 1} on: {name}=" in told


def test_without_a_change_the_run_is_the_undisturbed_one(place, tmp_path):
    out, told = resumed(place, tmp_path)
    assert weights(out) == weights(place / "whole")
    assert load_run(out).weights_sha256() == load_run(place / "whole").weights_sha256(), "another average"
    assert "changed" not in told


def test_the_rate_that_goes_up_again_is_announced(place, tmp_path):
    out, console = shutil.copytree(place / "whole", tmp_path / "run"), quiet()
    train([place / "store"], replace(CONFIG, train=replace(CONFIG.train, steps=12)), out, resume=True, console=console)
    assert "the learning rate goes up again, from" in console.file.getvalue()


def test_another_split_is_refused_and_the_same_is_not(place, tmp_path):
    split = load_run(place / "began").split
    write_split(tmp_path / "same.json", split, ())
    moved = replace(split, train=split.train[1:], test=split.train[:1])
    write_split(tmp_path / "other.json", moved, ())
    for other in (moved, tmp_path / "other.json"):
        with pytest.raises(CheckpointError, match="another split, by which 1 patient group would change"):
            resumed(place, tmp_path, split=other)
        shutil.rmtree(tmp_path / "run")
    out, _ = resumed(place, tmp_path, split=tmp_path / "same.json")
    assert weights(out) == weights(place / "whole")


def test_other_weights_of_stores_and_other_first_weights_are_refused(place, tmp_path):
    with pytest.raises(CheckpointError, match=r"store weights None, asked for is 2\.0"):
        resumed(place, tmp_path, weights=[2.0])
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"begun with no --init-from noted, now --init-from .*whole; leave out"):
        resumed(place, tmp_path, init_from=place / "whole")


def test_an_optimiser_keeps_its_own_settings_and_takes_what_was_gathered():
    layer = torch.nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    before = make_optimizer(layer, replace(CONFIG.train, weight_decay=0.1, betas=(0.8, 0.9)))
    before.step()
    after = make_optimizer(layer, replace(CONFIG.train, weight_decay=0.3, betas=(0.5, 0.6)))
    restore_optimizer(after, before.state_dict())
    assert [group["weight_decay"] for group in after.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in after.param_groups} == {(0.5, 0.6)}
    assert content_sha256(list(after.state.values())) == content_sha256(list(before.state.values()))


def changed(name):
    section, _, key = name.partition(".")
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **{key: OTHER[section][key]})})


def weights(out):
    return content_sha256(load_run(out).last_weights)


def records(out):
    return read_metrics(out / "metrics.jsonl")
