"""Which checkpoints a run keeps: by time, and the one with the best held-out score."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console
from support.lanes import slow_but
from support.runs import interrupted_after
from support.stores import make_store

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.data.known_scans import read_scans
from maesil.downstream.export import export_encoder
from maesil.training.checkpoint import CHECKPOINT, load_run
from maesil.training.kept import BEST, _best_so_far
from maesil.training.log import METRICS, read_metrics
from maesil.training.train import train
from maesil.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = RunConfig(
    ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1),
    train=TrainConfig(
        steps=6, batch=2, validate_every=1, checkpoint_every=1000, validation_crops=2, device="cpu", threads=1,
        keep_best=True,
    ),
)  # fmt: skip
SCORES = [10.0, 12.0, 11.0, 13.0, 12.5, 9.0]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "s"
    make_store(path, [(32, 40, 36), (40, 32, 33)], superpatch=32)
    return path


@pytest.fixture
def scored(monkeypatch):
    """Validations whose scores are known."""
    monkeypatch.setattr(Trainer, "validate", lambda self: {"validation_psnr": SCORES[self.step - 1]})


def test_the_best_is_a_run_of_its_own(store, tmp_path, scored):
    train([store], CONFIG, tmp_path / "r", console=Console(file=io.StringIO()))
    assert (load_run(tmp_path / "r").step, load_run(tmp_path / "r" / "best").step) == (6, 4)
    assert read_scans(tmp_path / "r" / "best") is not None
    export_encoder(tmp_path / "r" / "best", tmp_path / "e")


@pytest.mark.parametrize("cut", slow_but((1, 3, 5), (3,)))
def test_a_resumed_run_knows_what_was_best(store, tmp_path, scored, cut):
    interrupted_after(cut, [store], CONFIG, tmp_path / "r")
    assert load_run(tmp_path / "r" / "best").step == {1: 1, 3: 2, 5: 4}[cut]
    train([store], CONFIG, tmp_path / "r", resume=True, console=Console(file=io.StringIO()))
    assert load_run(tmp_path / "r" / "best").step == 4
    assert [one["validation_psnr"] for one in read_metrics(tmp_path / "r" / "metrics.jsonl")] == SCORES


@pytest.mark.parametrize(("minutes", "expected"), [(0.0, [0, 6]), (1e-9, [0, 1, 2, 3, 4, 5, 6]), (60.0, [0, 6])])
def test_checkpoints_by_time_stand_beside_those_by_steps(store, tmp_path, monkeypatch, minutes, expected):
    saved = []
    monkeypatch.setattr(Trainer, "save", lambda self, out: saved.append(self.step))
    config = replace(CONFIG, train=replace(CONFIG.train, checkpoint_minutes=minutes, keep_best=False))
    train([store], config, tmp_path / "r", console=Console(file=io.StringIO()))
    assert saved == expected


def test_what_was_best_after_the_checkpoint_comes_again_and_does_not_count(tmp_path):
    """A run that was killed: its log goes further than its checkpoint."""
    records = [{"step": number, "validation_psnr": score} for number, score in enumerate(SCORES, start=1)]
    (tmp_path / METRICS).write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    assert _best_so_far(tmp_path, 6) == -math.inf
    (tmp_path / BEST).mkdir()
    (tmp_path / BEST / CHECKPOINT).touch()
    assert [_best_so_far(tmp_path, step) for step in (0, 1, 3, 6)] == [-math.inf, 10.0, 12.0, 13.0]
