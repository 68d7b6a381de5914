"""Scoring a volume as `maesil evaluate` does, beside the same scores taken one by one, as they were first written.

    python tests/benchmarks/evaluation_speed.py RUN STORE [VOLUME] [--json FILE]

Both on one thread of the CPU, in one process, one after the other. The table has CPU seconds and by how much any figure
differs. Pictures and the start of the program are no part of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from support.slow_scores import volume_rows

from maesil.evaluation.predict import make_predictors
from maesil.evaluation.scores import as_json_has_it
from maesil.evaluation.volume import score_volumes
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.training.checkpoint import load_run


def timed(rows: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    """Return the CPU seconds (of all threads) that some rows took, and the rows."""
    started = time.process_time()
    found = rows()
    return time.process_time() - started, found


def largest_difference(ours: list[Any], theirs: list[Any]) -> float:
    """Return the largest difference of a score in dB."""
    pairs = [
        (one[name], other[name])
        for one, other in zip(ours, theirs, strict=True)
        for name in other
        if name.startswith("psnr") or name.endswith("_db")
    ]
    return max(abs(one - other) for one, other in pairs if one is not None)


def main() -> None:
    """Time both on one volume."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("volume", nargs="?", help="id, or its beginning; default: the first")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run, store = load_run(given.run), Store.open(given.store)
    reader, volume = SuperpatchReader(store), store.volume(given.volume) if given.volume else store.volumes()[0]
    predictors = make_predictors(run)
    together, ours = timed(lambda: score_volumes(run, reader, [volume], predictors, 0))
    one_by_one, theirs = timed(lambda: [as_json_has_it(row) for row in volume_rows(run, reader, volume, 0)])
    figures = {
        "voxels": volume.shape[0] * volume.shape[1] * volume.shape[2],
        "cpu_seconds": together,
        "cpu_seconds_one_by_one": one_by_one,
        "ratio": one_by_one / together,
        "largest_difference_db": largest_difference(ours, theirs),
        "machine": platform.processor() or platform.machine(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
