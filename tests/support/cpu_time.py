"""A plugin of pytest: how much CPU time each test takes, and which tests of the fast lane take too much.

CPU time is that of the process and of all it started, so a busy machine does not make a test look slow.
The table at the end of a run names the tests. No test fails for it: the same test takes longer on another machine.
"""

from __future__ import annotations

import os
import resource
from collections import defaultdict
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest

TOO_MUCH_S = 5.0
"""CPU seconds above which a test that is not marked slow is named at the end."""
_NAMED = 20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s() -> float:
    """Return the CPU seconds of this process, of the processes it started, and of those that these started."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    alive = sum(_of_process(child) for child in _children(os.getpid()))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + alive


def _children(process: int) -> list[int]:
    """Return the processes that a process started and that are still there; none where the system does not tell."""
    found: list[int] = []
    with suppress(OSError):  # it ended meanwhile
        # Three times for each test: pathlib takes twice as long.
        for thread in os.listdir(f"/proc/{process}/task"):  # noqa: PTH208
            place = f"/proc/{process}/task/{thread}/children"
            with suppress(OSError), open(place, "rb", buffering=0) as children:  # noqa: PTH123
                found += map(int, children.read().split())
    return found


def _of_process(process: int) -> float:
    try:
        told = Path(f"/proc/{process}/stat").read_text()
    except OSError:  # it ended meanwhile
        return 0.0
    ticks = map(int, told.rpartition(")")[2].split()[11:15])  # its own, and those of its children that ended
    return sum(ticks) / _TICKS_PER_S + sum(_of_process(child) for child in _children(process))


class CpuTimes:
    """Measures in each process that runs tests, and tells at the end in the process that the user started."""

    def __init__(self, table: str | None) -> None:
        self.table = table
        self.before = cpu_s()
        self.tests: dict[str, dict[str, float]] = defaultdict(dict)
        """CPU seconds of each test, by its phases: ``setup``, ``call``, ``teardown``."""
        self.slow: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = cpu_s()
        report.cpu_s, self.before = max(0.0, now - self.before), now  # type: ignore[attr-defined]
        return report  # with what it took: pytest-xdist sends the attributes of a report, too

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid][report.when or ""] = getattr(report, "cpu_s", 0.0)
        if "slow" in report.keywords:
            self.slow.add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.table:
            rows = [f"{sum(of.values()):.2f}\t{of.get('setup', 0.0):.2f}\t{test}" for test, of in self.tests.items()]
            Path(self.table).write_text("\n".join(["cpu_s\tsetup_s\ttest", *rows, ""]), encoding="utf-8")
        if not (lines := self.told()):
            return
        terminalreporter.section("CPU time")
        for line in lines:
            terminalreporter.line(line)

    def told(self) -> list[str]:
        """Return the lines about tests that take too much; none if no test does."""
        too_long = [(of.get("call", 0.0), test) for test, of in self.tests.items() if test not in self.slow]
        too_long = sorted((one for one in too_long if one[0] > TOO_MUCH_S), reverse=True)
        if not too_long:
            return []
        all_s = sum(sum(of.values()) for of in self.tests.values())
        return [
            f"{len(self.tests)} tests took {all_s:.0f} CPU seconds; {len(too_long)} that are not marked slow took more "
            f"than {TOO_MUCH_S:.0f} each. Make them faster, or mark them:",
            *(f"{seconds:7.1f}  {test}" for seconds, test in too_long[:_NAMED]),
        ]
