"""Progress of long work on standard error: bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from maesil.text import counted

_SECONDS_BETWEEN_LINES = 10.0

Report = Callable[[str, int, int | None], None]
"""Called with (stage, done, total or None if unknown)."""


class Tally:
    """Counts what is done of each stage, over all parts of a work, and reports it."""

    def __init__(self, report: Report | None = None, totals: Mapping[str, int] | None = None) -> None:
        self._report, self._totals, self._done = report, dict(totals or {}), dict.fromkeys(totals or {}, 0)

    def add(self, stage: str, count: int) -> None:
        """Note that ``count`` more are done."""
        self._done[stage] = self._done.get(stage, 0) + count
        if self._report:
            self._report(stage, self._done[stage], self._totals.get(stage))


@contextmanager
def progress(labels: dict[str, str], silent_when_quick: Collection[str] = ()) -> Iterator[Report]:
    """Yield a reporter for the named stages; ``labels`` says what each counts, for example ``{"scan": "file"}``.

    Where lines are written, the end of a stage is one of them. That of a stage of ``silent_when_quick`` is told only
    if the stage took so long that there was a line of it before.
    """
    console = Console(stderr=True, soft_wrap=True)  # a line of a log is one line, however long
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            yield _bar_reporter(bars, labels)
    else:
        yield _line_reporter(console, labels, silent_when_quick)


def _bar_reporter(bars: Progress, labels: dict[str, str]) -> Report:
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int | None) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(f"{stage} ({labels[stage]}s)", total=total)
        bars.update(tasks[stage], completed=done, total=total)

    return report


def _line_reporter(console: Console, labels: dict[str, str], silent_when_quick: Collection[str]) -> Report:
    said = time.monotonic()
    begun: dict[str, tuple[float, int]] = {}
    silent = set(silent_when_quick)

    def report(stage: str, done: int, total: int | None) -> None:
        nonlocal said
        now = time.monotonic()
        started, first = begun.setdefault(stage, (now, done))
        if now - said >= _SECONDS_BETWEEN_LINES:
            silent.discard(stage)
        elif done != total or stage in silent:
            return
        said = now
        told = f"{done} of {counted(total, labels[stage])}" if total else counted(done, labels[stage])
        if total and first < done < total:
            told += f", about {_span((now - started) * (total - done) / (done - first))} left"
        console.print(f"{stage}: {told}", highlight=False)

    return report


def _span(seconds: float) -> str:
    """Return a length of time in words that say no more than is known."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
