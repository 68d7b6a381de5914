"""A training from the store by the command line: killed, resumed, its losses compared; then scored and used.

On a GPU preset `base` for a minute, elsewhere `tiny` for some seconds. The resumed run takes the steps after the last
checkpoint again: the losses of these steps are compared with those before the kill.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu.part import Given, Row

from maesil.training.checkpoint import CHECKPOINT
from maesil.training.log import METRICS, read_metrics

PRESET = {"cuda": "base", "cpu": "tiny"}
SECONDS = {"cuda": 60.0, "cpu": 15.0}
"""From the first record to the kill."""
CHECKPOINTS = 2.5
"""In the time until the kill: the last one lies well before it."""
FOR_THE_REST = 0.45
"""Share of the part's time for resuming, scores and features."""


def rows(given: Given) -> Iterator[Row]:
    """Yield what the commands came to, as ``what`` and ``value``."""
    run = given.scratch / "run"
    seconds = min(SECONDS[given.device], given.seconds * (1 - FOR_THE_REST) - 10)
    command = _train(given, run, seconds)
    yield {"what": "preset", "value": PRESET[given.device]}
    before = yield from _killed(command, run, seconds)
    yield from _resumed([*command, "--resume"], run, before)
    yield from _scored(given, run)
    yield from _used(given, run)


def _train(given: Given, run: Path, seconds: float) -> list[str]:
    options = {
        "train.device": given.device, "train.checkpoint_every": 10**6, "train.validate_every": 10**6,
        "train.checkpoint_minutes": round(seconds / 60 / CHECKPOINTS, 3), "train.picture_every": 0,
        "train.validation": 0.34, "train.log_every": 10 if given.device == "cuda" else 1,
    }  # fmt: skip
    given_options = [word for name, value in options.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    preset = PRESET[given.device]
    return ["train", str(given.store), "--preset", preset, "--steps", "100000", "--out", str(run), *given_options]


def _killed(command: list[str], run: Path, seconds: float) -> Iterator[Row]:
    """Train, kill, and return the records up to then."""
    started = time.monotonic()
    child = _started(command)
    _wait(child, lambda: bool(_records(run)))
    yield {"what": "seconds to the first record", "value": round(time.monotonic() - started, 1)}
    begun = time.monotonic()
    _wait(child, lambda: time.monotonic() - begun >= seconds and _beyond_checkpoint(run))
    child.kill()
    child.wait()
    records = _records(run)
    steady = records[len(records) // 2 :]
    yield {"what": "steps until the kill", "value": records[-1]["step"]}
    for name in ("crops_per_s", "share_of_peak", "data_wait_share"):
        values = sorted(record[name] for record in steady)
        yield {"what": f"{name}, median of the second half", "value": round(values[len(values) // 2], 4)}
    yield {"what": "first and last loss", "value": f"{records[0]['loss']:.4f}, {records[-1]['loss']:.4f}"}
    return records


def _beyond_checkpoint(run: Path) -> bool:
    """Whether a step was logged since the last checkpoint, one that the resumed run takes again."""
    return (run / METRICS).stat().st_mtime_ns > (run / CHECKPOINT).stat().st_mtime_ns


def _resumed(command: list[str], run: Path, before: list[dict[str, Any]]) -> Iterator[Row]:
    """Resume past the step of the kill, end the run in order, and compare."""
    killed_at = before[-1]["step"]
    child = _started(command)
    _wait(child, lambda: bool(records := _records(run)) and records[-1]["step"] >= killed_at and _began(run, before))
    child.send_signal(signal.SIGTERM)
    code = child.wait()
    if code != 130:
        raise RuntimeError(f"maesil train --resume: expected exit code 130 after SIGTERM, found {code}")
    yield from compared(before, _records(run))


def _began(run: Path, before: list[dict[str, Any]]) -> bool:
    """Whether the resumed run has written records of its own: seconds and speed are never the same twice."""
    by_step = {record["step"]: record for record in before}
    return any(record != by_step.get(record["step"]) for record in _records(run))


def compared(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[Row]:
    """Compare the losses of steps that were taken twice."""
    losses = {record["step"]: record for record in after}
    twice = [
        (record["loss"], losses[record["step"]]["loss"])
        for record in before
        if record["step"] in losses and losses[record["step"]] != record
    ]
    if not twice:
        raise RuntimeError("expected steps that the resumed run took again, found none")
    yield {"what": "losses compared after the resume", "value": len(twice)}
    yield {"what": "of them equal to the bit", "value": sum(a == b for a, b in twice)}
    largest = max(abs(a - b) / abs(a) for a, b in twice)
    yield {"what": "largest difference, relative", "value": float(f"{largest:.2g}")}


def _scored(given: Given, run: Path) -> Iterator[Row]:
    path, started = given.scratch / "scores.json", time.monotonic()
    _done(["evaluate", str(run), str(given.store), "--device", given.device, "--json", str(path)])
    yield {"what": "evaluate (s)", "value": round(time.monotonic() - started, 1)}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row["region"] == "body":
            yield {"what": f"PSNR hidden, {row['model']} (dB)", "value": round(row["psnr_hidden"], 2)}


def _used(given: Given, run: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    path, started = given.scratch / "features.parquet", time.monotonic()
    _done(["features", str(run), str(given.store), "--device", given.device, "--out", str(path)])
    yield {"what": "features (s)", "value": round(time.monotonic() - started, 1)}
    yield {"what": "superpatches with features", "value": pq.ParquetFile(path).metadata.num_rows}


def _started(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "maesil", *command], stdout=sys.stderr)


def _done(command: list[str]) -> None:
    if code := _started(command).wait():
        raise RuntimeError(f"maesil {command[0]} ended with exit code {code}")


def _wait(child: subprocess.Popen[bytes], until: Callable[[], bool]) -> None:
    while not until():
        if (code := child.poll()) is not None:
            raise RuntimeError(f"maesil train ended with exit code {code}")
        time.sleep(0.1)


def _records(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / METRICS) if (run / METRICS).exists() else []
