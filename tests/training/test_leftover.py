"""A run that was killed before its first checkpoint, and the same command, or another, given again."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import pytest
from rich.console import Console
from support.lanes import slow_but
from support.stores import make_store

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.config.toml import load_config
from maesil.data.split import write_split
from maesil.errors import CheckpointError, DamagedError
from maesil.training.checkpoint import CHECKPOINT, load_run
from maesil.training.log import read_metrics
from maesil.training.train import train
from maesil.training.trainer import Trainer

CONFIG = RunConfig(
    ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1),
    train=TrainConfig(steps=2, batch=2, validation_crops=2, device="cpu", threads=1, lr=1e-3),
)
BEGUN = "a run was begun here and ended before its first checkpoint"


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("leftover")
    for name, superpatch in (("store", 32), ("other", 32), ("recipe", 16)):
        shapes = [(32, 40, 36), (40, 32, 33), (32, 32, 48)][: 2 if name == "other" else 3]
        make_store(root / name, shapes, superpatch=superpatch)
    killed_before_the_first_checkpoint(root, root / "left")
    start(root, root / "whole")
    return root


def killed_before_the_first_checkpoint(root, out, config=CONFIG, **options):
    def kill(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "save", kill)
        start(root, out, config, **options)
    assert not (out / CHECKPOINT).exists() and (out / "config.toml").exists()


def start(root, out, config=CONFIG, store="store", **options):
    console = Console(file=io.StringIO(), width=1000)
    train([root / store], config, out, console=console, **options)
    return console.file.getvalue()


def again(place, tmp_path, config=CONFIG, resume="auto", **options):
    out = tmp_path / "run"
    shutil.copytree(place / "left", out)
    return out, start(place, out, config, resume=resume, **options)


def other(**values):
    return replace(CONFIG, train=replace(CONFIG.train, **values))


def test_the_same_command_begins_the_same_run_and_says_so(place, tmp_path):
    out, told = again(place, tmp_path)
    assert f"{BEGUN}: it begins again as it was" in told
    assert losses(out) == losses(place / "whole")
    assert "begun" not in start(place, out, resume="auto")


OTHERS = {
    "preset": ({"config": load_config("small", None, ["model.crop=16", "train.device=cpu"])}, r"model\.width=16, now"),
    "seed": ({"config": other(seed=1)}, r"train\.seed=0, now 1"),
    "mask": ({"config": replace(CONFIG, mask=replace(CONFIG.mask, axis=0.25))}, r"mask\.axis=0\.5, now 0\.25"),
    "store": ({"store": "other"}, r"other stores \(.*other was not among its stores; .*store is missing\)"),
    "recipe": ({"store": "recipe"}, r"other stores"),
    "weights": ({"weights": [2.0]}, r"store weights None, now 2\.0"),
}


@pytest.mark.parametrize("name", slow_but(OTHERS, ("preset", "seed", "store")))
def test_another_one_is_refused_with_auto_and_told_without(place, tmp_path, name):
    options, expected = OTHERS[name]
    with pytest.raises(CheckpointError, match=f"{BEGUN}, with .*{expected}") as refused:
        again(place, tmp_path, **options)
    assert "\n" not in str(refused.value) and "name another --out" in str(refused.value)
    assert contents(tmp_path / "run") == contents(place / "left")
    if name != "preset":
        shutil.rmtree(tmp_path / "run")
        out, told = again(place, tmp_path, resume=False, **options)
        assert "another run takes its place" in told and load_run(out).step == 2


def test_other_first_weights_are_refused_and_the_same_are_not(place, tmp_path):
    with pytest.raises(CheckpointError, match=f"{BEGUN}, with no --init-from noted, now --init-from .*whole"):
        again(place, tmp_path, init_from=place / "whole")
    out = tmp_path / "from"
    killed_before_the_first_checkpoint(place, out, init_from=place / "whole")
    assert "begins again as it was" in start(
        place, shutil.copytree(out, tmp_path / "a"), resume="auto", init_from=place / "whole"
    )
    with pytest.raises(CheckpointError, match=r"with the weights of .*whole, now without --init-from"):
        start(place, out, resume="auto")
    told = start(place, out)
    assert "another run takes its place" in told and losses(out) == losses(place / "whole")
    assert "now" not in start(place, out, resume="auto")


def test_another_split_is_refused(place, tmp_path):
    split = load_run(place / "whole").split
    write_split(tmp_path / "same.json", split, ())
    write_split(tmp_path / "other.json", replace(split, train=split.train[1:], validation=split.train[:1]), ())
    with pytest.raises(CheckpointError, match="another split, by which 2 patient groups would change the part"):
        again(place, tmp_path, split=tmp_path / "other.json")
    shutil.rmtree(tmp_path / "run")
    assert "begins again as it was" in again(place, tmp_path, split=tmp_path / "same.json")[1]


def test_what_may_change_on_resume_may_change_here_and_is_told(place, tmp_path):
    out, told = again(place, tmp_path, other(lr=2e-3, readers=1))
    assert "changed: train.lr=0.002, before 0.001" in told and "readers" not in told
    assert load_run(out).config.train.lr == 2e-3


def test_a_store_that_grew_counts_as_it_was(place, tmp_path):
    shutil.copytree(place / "store", tmp_path / "store")
    killed_before_the_first_checkpoint(tmp_path, tmp_path / "run")
    make_store(tmp_path / "store", [(32, 40, 36), (40, 32, 33), (32, 32, 48), (48, 32, 32)], superpatch=32)
    told = start(tmp_path, tmp_path / "run", resume="auto")
    assert "grown by 1 volume" in told
    assert losses(tmp_path / "run") == losses(place / "whole")


def test_steps_that_are_measured_may_differ(place, tmp_path):
    left = other(minutes=0.002)
    killed_before_the_first_checkpoint(place, tmp_path / "run", left)
    text = (tmp_path / "run" / "config.toml").read_text()
    steps = load_config(file=tmp_path / "run" / "config.toml").train.steps
    (tmp_path / "run" / "config.toml").write_text(text.replace(f"steps = {steps}", f"steps = {steps + 7}"))
    told = start(place, tmp_path / "run", left, resume="auto")
    assert "begins again as it was" in told and "changed" not in told


@pytest.mark.parametrize("damage", ["config.toml", "split.json", "stores.json"])
def test_what_is_missing_or_damaged_is_never_passed_over_in_silence(place, tmp_path, damage):
    left = shutil.copytree(place / "left", tmp_path / "left" / "left").parent
    (left / "left" / damage).write_text("half of {", encoding="utf-8")
    shutil.copytree(place / "store", left / "store")
    if damage == "config.toml":
        assert "cannot be compared in full" in again_from(left, tmp_path / "a")
    else:
        with pytest.raises(DamagedError, match=f"{damage}: expected a file as maesil wrote it"):
            again_from(left, tmp_path / "a")
    (left / "left" / damage).unlink()
    with pytest.raises(CheckpointError, match=r"train\.seed=0|other stores|another split"):
        again_from(left, tmp_path / "b", other(seed=3))


def again_from(left, tmp_path, config=CONFIG):
    shutil.copytree(left / "left", tmp_path / "run")
    return start(left, tmp_path / "run", config, resume="auto")


def test_a_configuration_alone_is_compared(place, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copyfile(place / "left" / "config.toml", tmp_path / "run" / "config.toml")
    with pytest.raises(CheckpointError, match=r"train\.batch=2, now 4"):
        start(place, tmp_path / "run", other(batch=4), resume="auto")
    told = start(place, tmp_path / "run", resume="auto")
    assert "its stores are not noted" in told


def losses(out):
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl")]


def contents(folder):
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}
    assert json.loads(kept["split.json"])
    return kept
