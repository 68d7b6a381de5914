"""Patients who give no crop are named, not counted; or padded, or refused, as asked."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from support.stores import add_volume, make_store, synthetic_hu

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.data.split import Split
from maesil.downstream.export import export_encoder
from maesil.errors import UsageError
from maesil.training.checkpoint import load_run
from maesil.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = RunConfig(
    ModelConfig(crop=32, width=16, depth=1, decoder_width=16, decoder_depth=1),
    train=TrainConfig(steps=1, batch=2, min_body=0.4, device="cpu", threads=1),
)
EVERYBODY = Split(("thick", "thin", "lean"), ())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A scan that fills crops, one of a cell's thickness, and one with next to no body."""
    store = make_store(tmp_path_factory.mktemp("thin") / "s", [])
    add_volume(store, synthetic_hu((40, 40, 40), 1), name="thick", group="thick")
    add_volume(store, synthetic_hu((8, 40, 40), 2), name="thin", group="thin")
    lean = synthetic_hu((32, 32, 32), 3)
    body = lean > 10_000
    body[:8, :8, :8] = True
    add_volume(store, lean, name="lean", group="lean", body=body)
    return store.path


def told(store, out, thin, **options):
    console = Console(file=io.StringIO(), width=400)
    config = replace(CONFIG, train=replace(CONFIG.train, thin=thin))
    train([store], config, out, console=console, split=EVERYBODY, **options)
    return console.file.getvalue()


def test_they_are_named_with_the_reason_and_not_counted(store, tmp_path):
    said = told(store, tmp_path / "r", "skip")
    assert "1 patient to train on" in said
    assert "patient thin (volume" in said and "8 x 40 x 40 voxels: thinner than a crop of 32" in said
    assert "patient lean (volume" in said and "no crop of 32 holds a body share of 0.4" in said
    run = load_run(tmp_path / "r")
    assert (run.split.train, set(run.split.unused)) == (("thick",), {"thin", "lean"})
    assert json.loads((tmp_path / "r" / "split.json").read_text())["unused"] == list(run.split.unused)
    export_encoder(tmp_path / "r", tmp_path / "e")
    assert json.loads((tmp_path / "e" / "config.json").read_text())["training"]["patients"] == 1


def test_a_run_on_them_goes_on_with_its_split_and_another_run_may_use_them(store, tmp_path):
    told(store, tmp_path / "r", "skip")
    config = replace(CONFIG, train=replace(CONFIG.train, steps=2))
    quiet = Console(quiet=True)
    train([store], config, tmp_path / "r", resume=True, split=EVERYBODY, console=quiet)
    assert load_run(tmp_path / "r").step == 2
    padded = replace(CONFIG, train=replace(CONFIG.train, thin="pad"))
    train([store], padded, tmp_path / "other", split=tmp_path / "r" / "split.json", console=quiet)
    assert load_run(tmp_path / "other").split.train == ("thick", "thin")


def test_padded_the_thin_one_is_trained_on(store, tmp_path):
    said = told(store, tmp_path / "r", "pad")
    assert "2 patients to train on" in said and "patient thin" not in said and "patient lean" in said


def test_on_request_they_are_an_error(store, tmp_path):
    with pytest.raises(
        UsageError, match=r"train\.thin=refuse: no crop can be cut of 2 patients .*thinner than a crop.*body share"
    ):
        told(store, tmp_path / "r", "refuse")
