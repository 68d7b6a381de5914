"""A small run that trains in a second, for the tests of training."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from rich.console import Console

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.installed import PICTURES
from maesil.training import setup
from maesil.training.throughput import flops_per_crop
from maesil.training.train import train

CONFIG = RunConfig(
    ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1),
    train=TrainConfig(
        steps=8, batch=2, checkpoint_every=3, validate_every=4, validation_crops=3, device="cpu", threads=1
    ),
)


def with_train(**changes):
    """Return `CONFIG` with other options of training."""
    return replace(CONFIG, train=replace(CONFIG.train, **changes))


def run(store, out, config=CONFIG, **options):
    """Train; return the summary and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    summary = train([store], config, out, console=console, **options)
    return summary, console.file.getvalue()


def metrics(out):
    """Return the records of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


_COUNTED: dict[object, int] = {}


@contextmanager
def plainly() -> Iterator[None]:
    """Draw no pictures of runs and scores, as where their package is missing; count operations of equal models once."""

    def counted(learner, crop):
        config, pictured = learner.config, crop.inputs.pictured is not None
        key = (config.model, config.mask, config.train.picture_head_every, config.train.device, pictured)
        if key not in _COUNTED:
            _COUNTED[key] = flops_per_crop(learner, crop)
        return _COUNTED[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in ("training.train", "evaluation.evaluate"):
            patch.setattr(f"maesil.{module}.PICTURES", ("no_such_package",))
        patch.setattr(setup, "flops_per_crop", counted)
        yield


@contextmanager
def pictured() -> Iterator[None]:
    """Draw them all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maesil.training.train.PICTURES", PICTURES)
        yield
