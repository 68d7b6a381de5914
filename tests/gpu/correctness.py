"""The kernels against float64, by pytest: on a GPU `kernels/on_gpu.py`, without one Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gpu.part import Given, Row

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
AT_ONCE = 6
"""Processes on a GPU: what takes time is compiling."""


def rows(given: Given) -> Iterator[Row]:
    """Yield a row a test, as each ends."""
    on_gpu = given.device == "cuda"
    file = KERNELS / ("on_gpu.py" if on_gpu else "interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu.log_of_tests", str(file)]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(AT_ONCE, os.cpu_count() or 1))]
    environment = dict(os.environ)
    if not on_gpu:
        command += ["-p", "support.old_interpreter"]
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        log = Path(folder) / "tests.txt"
        log.touch()
        child = subprocess.Popen(
            command, env={**environment, "MAESIL_TEST_LOG": str(log)}, cwd=KERNELS.parents[1], stdout=sys.stderr
        )
        yield from _ended(log, child)
    if child.returncode:
        raise RuntimeError(f"pytest {file.name} ended with exit code {child.returncode}")


def _ended(log: Path, child: subprocess.Popen[bytes]) -> Iterator[Row]:
    """Follow the log of tests while pytest runs."""
    with log.open() as lines:
        while True:
            ended = child.poll() is not None
            while line := lines.readline():
                outcome, seconds, test = line.rstrip("\n").split(" ", 2)
                yield {"test": test, "outcome": outcome, "seconds": float(seconds)}
            if ended:
                return
            time.sleep(0.1)
