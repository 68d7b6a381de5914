"""What a run tells the world: metrics as JSON lines, a tracker, a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from maesil.files import write_whole

METRICS = "metrics.jsonl"
Record = dict[str, float]
"""What was measured up to one step, by name; ``step`` says which."""
Outcome = Literal["finished", "interrupted", "failed"]
"""How a run ended: as it was meant to, where it was asked to, or by an error."""
_EARLIER_NAMES = {"superpatches_per_s": "crops_per_s"}
"""Names in the metrics that an earlier version wrote, and today's."""
_SECONDS_BETWEEN_LINES = 10.0


class Follower(Protocol):
    """What is told every record, too; it raises nothing."""

    def write(self, record: Record) -> None:
        """Take a record."""

    def close(self, outcome: Outcome) -> None:
        """Take note that the run ended."""


class RunLog:
    """The log of one run from step ``start`` on; metrics of later steps, from before a kill, are cut off."""

    def __init__(
        self, run_dir: Path, start: int, steps: int, console: Console, follower: Follower | None = None
    ) -> None:
        truncate_metrics(run_dir / METRICS, start)
        self._metrics = (run_dir / METRICS).open("a", encoding="utf-8")
        self._follower, self._console = follower, console
        self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}{task.fields[psnr]}{task.fields[speed]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=steps, completed=start, loss="", psnr="", speed="")
        self._steps, self._loss, self._psnr, self._speed = steps, "", "", ""

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._metrics.close()
        if self._follower is not None:
            self._follower.close(_outcome(kind))

    def write(self, record: Record) -> None:
        """Add one record to the metrics, and tell the tracker."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        if "crops_per_s" in record:
            self._speed = (
                f"  {record['crops_per_s']:.3g} crops/s, {record['share_of_peak']:.0%} of peak, "
                f"{record['data_wait_share']:.0%} waiting for data"
            )
        if "validation_psnr" in record:
            self._psnr = f"  held out {record['validation_psnr']:.2f} dB"
        if self._follower is not None:
            self._follower.write(record)

    def sync(self) -> None:
        """Make the metrics durable: called before a checkpoint that counts on them."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def show(self, step: int, loss: float | None) -> None:
        """Move the progress bar, or now and then print a line where there is no terminal.

        Without a loss, which is not read at every step, the last one stands.
        """
        told = self._loss = self._loss if loss is None else f"loss {loss:.4f}"
        self._progress.update(self._task, completed=step, loss=told, psnr=self._psnr, speed=self._speed)
        now = time.monotonic()
        if self._progress.disable and (now - self._last_line > _SECONDS_BETWEEN_LINES or step == self._steps):
            line = f"step {step}/{self._steps}  {told}{self._psnr}{self._speed}"
            self._console.print(line, highlight=False, soft_wrap=True)
            self._last_line = now


def _outcome(error: type[BaseException] | None) -> Outcome:
    if error is None:
        return "finished"
    return "interrupted" if issubclass(error, KeyboardInterrupt) else "failed"


class NoLog(nullcontext["NoLog"]):
    """The log of a rank that writes none."""

    def __enter__(self) -> NoLog:
        return self

    def write(self, record: Record) -> None:
        """Leave the record to the first rank."""

    def sync(self) -> None:
        """Do nothing."""

    def show(self, step: int, loss: float | None) -> None:
        """Show nothing."""


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the records up to ``step`` of a metrics file, if there is one; torn and damaged lines go too."""
    if not path.exists():
        return
    kept = [line.decode() for line in path.read_bytes().splitlines() if _step_of(line) <= step]
    write_whole(path, "".join(line + "\n" for line in kept))


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a metrics file, under today's names; torn and damaged lines are left out."""
    records = (json.loads(line) for line in path.read_bytes().splitlines() if math.isfinite(_step_of(line)))
    return [{_EARLIER_NAMES.get(name, name): value for name, value in record.items()} for record in records]


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
