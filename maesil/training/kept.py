"""Which checkpoints a run keeps: the last one, and the one with the best held-out score."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from maesil.cache.catalogue import RUN_STORES
from maesil.data.known_scans import SCANS
from maesil.training.checkpoint import CHECKPOINT
from maesil.training.log import METRICS, read_metrics
from maesil.training.trainer import Trainer

BEST = "best"
_BESIDE = (RUN_STORES, SCANS, "config.toml", "split.json")
"""What makes a checkpoint a run folder."""


class Kept:
    """The checkpoints of a run on its way."""

    def __init__(self, out: Path, trainer: Trainer, copy: Callable[[], None] = lambda: None) -> None:
        """``copy`` is called on the first rank after each checkpoint: it takes the run to its mirror."""
        self._out, self._trainer, self._copy = out, trainer, copy
        self._written = time.monotonic()
        self._best = _best_so_far(out, trainer.step)

    def due(self) -> bool:
        """Return, on all ranks alike, whether a checkpoint is to be written after this step, by steps or by time."""
        settings, ranks = self._trainer.config.train, self._trainer.ranks
        if self._trainer.step % settings.checkpoint_every == 0:
            return True
        late = time.monotonic() - self._written >= 60 * settings.checkpoint_minutes
        return bool(settings.checkpoint_minutes) and ranks.any(ranks.first and late)

    def write(self) -> None:
        """Write the last checkpoint, on the first rank."""
        if self._trainer.ranks.first:
            self._trainer.save(self._out)
            self._copy()
        self._written = time.monotonic()

    def write_if_best(self, score: float) -> None:
        """Write ``RUN/best``, a run folder of its own, if no held-out score was higher and it is asked for."""
        if not self._trainer.config.train.keep_best or score <= self._best:
            return
        self._best, folder = score, self._out / BEST
        folder.mkdir(exist_ok=True)
        for name in _BESIDE:
            shutil.copyfile(self._out / name, folder / name)
        self._trainer.save(folder)


def _best_so_far(out: Path, step: int) -> float:
    """Return the best held-out score up to a step, if any was kept; what came later was cut off, and comes again."""
    if not (out / BEST / CHECKPOINT).exists() or not (out / METRICS).exists():
        return -math.inf
    records = [one for one in read_metrics(out / METRICS) if one["step"] <= step]
    return max((one["validation_psnr"] for one in records if "validation_psnr" in one), default=-math.inf)
