"""From the store to the device: the pinned ring of the loader, and scans that stay on the device.

*Alone* is what arrives where no step is taken. The other columns are a training: its speed, the share of the time in
which it waited for crops, the memory of the scans on the device, and the peak of the whole.
"""

from __future__ import annotations

import io
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from gpu.part import Given, Row
from rich.console import Console

from maesil.config.presets import PRESETS
from maesil.config.schema import RunConfig
from maesil.training.setup import measure_pace, prepare
from maesil.training.throughput import wait_for
from maesil.training.trainer import Prepared, Trainer

LOADERS = {"pinned ring": False, "resident scans": True}
FAR = 10**6
"""More steps than there is time for."""
WARM_UP = {"cuda": 5, "cpu": 1}
"""Batches before the clock."""


def rows(given: Given) -> Iterator[Row]:
    """Yield a row a preset and loader."""
    presets = ("base", "tiny") if given.device == "cuda" else ("tiny",)
    planned = list(itertools.product(presets, LOADERS))
    for place, (preset, loader) in enumerate(planned):
        seconds = max(1.0, min(4.0, given.seconds_left / (len(planned) - place) / 4))
        config = PRESETS[preset]
        train = replace(config.train, device=given.device, device_resident=LOADERS[loader], validation=0.0)
        yield _measured(loader, preset, replace(config, train=train), given, seconds)


def _measured(loader: str, preset: str, config: RunConfig, given: Given, seconds: float) -> Row:
    out, quiet = given.scratch / f"{preset}-{loader}".replace(" ", "-"), Console(file=io.StringIO())
    trainer = prepare([given.store], config, Path(out), resume=False, console=quiet)
    before = _allocated(trainer.device)
    with trainer.loader() as opened:
        held = _allocated(trainer.device) - before
        alone = _arriving(trainer, trainer.prepared(opened.batches(0, FAR)), seconds)
    with trainer.loader() as opened:
        training, peak = _training(trainer, trainer.prepared(opened.batches(0, FAR)), seconds, quiet)
    scans = sum(2 * math.prod(trainer.sampler.reach(volume)) for _, volume in trainer.sampler.volumes)
    on_gpu = trainer.device.type == "cuda"
    return {
        "preset": preset, "loader": loader, "batch": config.train.batch, "alone_crops_per_second": round(alone, 1),
        "alone_megabytes_per_second": round(alone * 2 * math.prod(config.model.crop_zyx) / 1e6),
        "crops_per_second": round(training["crops_per_s"], 1), "share_of_peak": round(training["share_of_peak"], 4),
        "data_wait_share": round(training["data_wait_share"], 4), "scans_megabytes": round(scans / 1e6, 1),
        "held_megabytes": round(held / 1e6, 1) if on_gpu else None,
        "peak_megabytes": round(peak / 1e6) if on_gpu else None,
    }  # fmt: skip


def _arriving(trainer: Trainer, batches: Iterator[Prepared], seconds: float) -> float:
    """Return how many crops arrive on the device in a second."""
    for _ in itertools.islice(batches, WARM_UP[trainer.device.type]):
        pass
    wait_for(trainer.device)
    steps, started = 0, time.monotonic()
    for _ in batches:
        steps += 1
        if time.monotonic() - started >= seconds:
            break
    wait_for(trainer.device)
    return steps * trainer.config.train.batch / (time.monotonic() - started)


def _training(
    trainer: Trainer, batches: Iterator[Prepared], seconds: float, console: Console
) -> tuple[dict[str, float], int]:
    """Take steps for a while; return the record of the log, and the peak of the device's memory."""
    pace = measure_pace(trainer, console)
    for ready in itertools.islice(batches, WARM_UP[trainer.device.type]):
        trainer.training_step(ready)
    trainer.read()
    if trainer.on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    pace.restart()
    started = time.monotonic()
    for ready in pace.over(batches):
        trainer.training_step(ready)
        if time.monotonic() - started >= seconds:
            break
    trainer.read()
    return pace.record(), torch.cuda.max_memory_allocated(trainer.device) if trainer.on_gpu else 0


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
