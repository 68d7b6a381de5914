"""A plugin of pytest: one line a test into the file that ``MAESIL_TEST_LOG`` names, as each ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Write where all reports come together: not in the workers of pytest-xdist."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(LogOfTests(Path(os.environ["MAESIL_TEST_LOG"])))


class LogOfTests:
    """Outcome, seconds and name of every test."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what became of a test."""
        if report.when == "call" or report.outcome != "passed":
            with self._path.open("a", encoding="utf-8") as log:
                log.write(f"{report.outcome} {report.duration:.2f} {report.nodeid.partition('::')[2]}\n")
