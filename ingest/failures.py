"""What a failed task amounts to: the refusal of its volume, or the end of the run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from maesil.codes import RefusalCode
from maesil.errors import DISK_FULL, MaesilError, Refused, ResourceError, disk_full

MAY_PASS: tuple[RefusalCode, ...] = (
    "out_of_memory",
    "worker_lost",
    "decoder_killed",
    "unexpected",
    "vanished",
    "unreadable",
)
"""Refusals that need not be the source's fault: tried again by every run."""


def as_refusal(error: Exception) -> Refused:
    """Return the refusal that a failed task amounts to; errors that concern the whole run are raised again."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        raise disk_full() from error
    if isinstance(error, MaesilError):
        raise error
    if isinstance(error, MemoryError):
        return Refused("out_of_memory", "the volume does not fit in this worker's memory; use fewer workers")
    if type(error).__name__ == "NoWorkerError":
        raise ResourceError(
            "all workers died and none came back; run the same command again, with fewer --workers"
        ) from error
    if type(error).__name__ in ("CommClosedError", "CancelledError", "FutureCancelledError"):
        raise ResourceError("the Dask scheduler is gone; start it and run the same command again") from error
    if type(error).__name__ == "KilledWorker":
        return Refused("worker_lost", "the worker died while it read this volume (memory, or a decoder crashed)")
    return Refused("unexpected", f"{type(error).__name__}: {error}")


def json_ready(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return numbers as JSON knows them: neither numpy's nor infinite ones."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in numbers.items()}
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in plain.items()
    }
