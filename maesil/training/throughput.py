"""How fast a run is: crops per second, the share of what the device can do, the share of time without data."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch

from maesil.text import counted
from maesil.training.flops import count_flops
from maesil.training.learner import Learner, MicroBatch, picture_loss

T = TypeVar("T")

_REPEATS = 5
_WARM_UP_SECONDS = {"cuda": 0.5, "cpu": 0.05}
"""A GPU that was idle raises its clocks while it works; before that a product takes longer than in a run."""
_EDGE = {"cuda": 8192, "cpu": 1024}


@functools.cache
def measure_peak(device: torch.device, threads: int) -> float:
    """Measure what a device reaches in one large matrix product (FLOP/s): bfloat16 on a GPU, else float32.

    The best of a few after a warm-up; ``threads`` are those of a CPU, by which the figure is remembered.
    """
    edge, dtype = _EDGE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # torch's own is the run's
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype, generator=generator) for _ in range(2))
    warm, best, timed = time.perf_counter() + _WARM_UP_SECONDS[device.type], float("inf"), 0
    while timed < _REPEATS:
        wait_for(device)
        started = time.perf_counter()
        torch.mm(a, b)
        wait_for(device)
        if started >= warm:
            best, timed = min(best, time.perf_counter() - started), timed + 1
    return 2 * edge**3 / best


def wait_for(device: torch.device) -> None:
    """Return once a GPU has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_per_crop(learner: Learner, crop: MicroBatch) -> int:
    """Count the operations of forward and backward for a micro-batch of one crop; no gradient is left behind.

    A picture head draws some of the crops of a step: it enters with their share.
    """
    alone = replace(crop, inputs=replace(crop.inputs, pictured=None))
    flops = _flops_of(learner, alone)
    if learner.model.trained_beside is not None:
        flops += (_flops_of(learner, crop) - flops) // learner.config.train.picture_head_every
    return flops


def _flops_of(learner: Learner, crop: MicroBatch) -> int:
    model = learner.model.eval()  # a codebook learns in training only

    def forward_and_backward() -> None:
        with learner.autocast():
            prediction = model(crop.inputs)
        loss = crop.inputs.loss(prediction.patches_BSV, crop.weight_BS) + picture_loss(prediction, crop)
        (loss if prediction.auxiliary_loss is None else loss + prediction.auxiliary_loss).backward()

    flops = count_flops(forward_and_backward)
    learner.optimizer.zero_grad(set_to_none=True)
    model.train()
    return flops


def duration_told(seconds: float) -> str:
    """Return a duration in words, by its largest unit."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return counted(round(seconds), "second") if seconds >= 1 else "a second"


class Pace:
    """The clock of a run: how long its steps took since they were last asked for, and how long they waited for data.

    ``for item in pace.over(items)`` times the waiting; ``crops`` is the size of a step, ``flops`` and ``peak`` (FLOP
    and FLOP/s) those of a step and of all devices together.
    """

    def __init__(self, crops: int, flops: float, peak: float) -> None:
        self._crops, self._flops, self._peak = crops, flops, peak
        self.restart()

    def least_seconds(self, steps: int) -> float:
        """Return how long so many steps take at the peak: no run is faster."""
        return steps * self._flops / self._peak

    def restart(self) -> None:
        """Count from now on."""
        self._since, self._steps, self._waited, self.last_wait = time.monotonic(), 0, 0.0, 0.0

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items of steps, and take the time it takes to get them."""
        source = iter(items)
        while True:
            started = time.monotonic()
            item = next(source, None)
            if item is None:
                return
            self.last_wait = time.monotonic() - started
            self._waited += self.last_wait
            self._steps += 1
            yield item

    def record(self) -> dict[str, float]:
        """Return what the steps came to, for the log."""
        seconds = time.monotonic() - self._since
        return {
            "seconds": seconds,
            "crops_per_s": self._steps * self._crops / seconds,
            "share_of_peak": self._steps * self._flops / seconds / self._peak,
            "data_wait_share": self._waited / seconds,
        }
