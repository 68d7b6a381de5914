"""``maesil train --profile``: a trace of a few steps, and on one screen where their time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, schedule

from maesil.files import write_whole
from maesil.training.throughput import wait_for
from maesil.training.trainer import Prepared

_BEFORE, _TRACED, _OPERATORS = 4, 6, 15
_LAST_BEFORE = _BEFORE - 1


class StepProfiler:
    """Leaves some steps alone, traces the next few, and writes ``trace.json`` and ``summary.txt``."""

    def __init__(self, folder: Path, device: torch.device, console: Console) -> None:
        self._folder, self._device, self._console = folder, device, console
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(activities=activities, schedule=schedule(wait=_LAST_BEFORE, warmup=1, active=_TRACED))
        self._seen = 0
        self._seconds = {"step": 0.0, "data wait": 0.0, "read": 0.0, "copy": 0.0}
        self._last = time.monotonic()

    def step(self, ready: Prepared, waited: float) -> None:
        """Note the end of a step, and what came before it."""
        if self._seen == _BEFORE + _TRACED:
            return
        wait_for(self._device)
        now, traced = time.monotonic(), self._seen >= _BEFORE
        taken = {"step": now - self._last, "data wait": waited, "read": ready.read_seconds, "copy": ready.copy_seconds}
        for name, seconds in taken.items():
            self._seconds[name] += seconds if traced else 0.0
        self._seen += 1
        self._profile.step()
        if self._seen == _BEFORE + _TRACED:
            self._write()
        self._last = time.monotonic()

    def start(self) -> None:
        """Start counting steps."""
        self._profile.start()

    def stop(self) -> None:
        """End, and say so if that is too early."""
        if self._seen < _BEFORE + _TRACED:
            self._profile.stop()
            needed = _BEFORE + _TRACED
            self._console.print(f"--profile: nothing traced, expected at least {needed} steps, saw {self._seen}")

    def _write(self) -> None:
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / "trace.json"))
        text = self.summary()
        write_whole(self._folder / "summary.txt", text)
        self._console.print(text, highlight=False, markup=False)

    def summary(self) -> str:
        """Return the one screen: a step and its parts, then the operators that took most of it."""
        ms = {name: 1e3 * seconds / _TRACED for name, seconds in self._seconds.items()}
        lines = [
            f"{_TRACED} steps traced on {self._device}: {self._folder / 'trace.json'} (open in Perfetto)",
            f"  step       {ms['step']:10.2f} ms",
            f"  data wait  {ms['data wait']:10.2f} ms  {ms['data wait'] / ms['step']:6.1%} of the step",
            f"  read       {ms['read']:10.2f} ms  until a batch was there, beside the step before",
            f"  copy       {ms['copy']:10.2f} ms  masks and the way to the device, beside the step before",
            f"{'operators by their own time':44} {'ms a step':>10} {'share':>7} {'calls a step':>13}",
        ]
        averages = sorted(self._profile.key_averages(), key=self._own_time, reverse=True)
        total = sum(map(self._own_time, averages)) or 1.0
        for average in averages[:_OPERATORS]:
            own, calls = self._own_time(average), average.count / _TRACED
            lines.append(f"  {str(average.key)[:42]:42} {own / 1e3 / _TRACED:10.2f} {own / total:7.1%} {calls:13.1f}")
        return "\n".join(lines) + "\n"

    def _own_time(self, average: FunctionEventAvg) -> float:
        """Return the time (us) that an operator took itself, on the GPU if there is one."""
        if str(average.key).startswith("ProfilerStep"):
            return 0.0
        own = average.self_device_time_total if self._device.type == "cuda" else average.self_cpu_time_total
        return float(own)


@contextmanager
def profiled(run_dir: Path, device: torch.device, console: Console) -> Iterator[StepProfiler]:
    """Trace steps of a run into ``RUN/profile``."""
    profiler = StepProfiler(run_dir / "profile", device, console)
    profiler.start()
    try:
        yield profiler
    finally:
        profiler.stop()
