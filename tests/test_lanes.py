"""The lanes of the tests: what takes too much is named, and the pages say what the marks mean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.cpu_time import TOO_MUCH_S, CpuTimes, cpu_s
from support.lanes import slow_but

ROOT = Path(__file__).parents[1]
BURNS = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ninput()"


def report(test: str, seconds: float, when: str = "call", **keywords: int) -> SimpleNamespace:
    return SimpleNamespace(nodeid=test, cpu_s=seconds, when=when, keywords=keywords)


@pytest.fixture
def times():
    return CpuTimes(None)


def test_what_takes_too_much_is_named_unless_it_is_marked_slow(times):
    for one in (report("a", 60), report("b", TOO_MUCH_S), report("c", 90, slow=1), report("d", 7), report("e", 0.1)):
        times.pytest_runtest_logreport(one)
    times.pytest_runtest_logreport(report("e", 30, "setup"))  # others share what a fixture makes
    told = times.told()
    assert "5 tests" in told[0] and "2 that are not marked slow" in told[0]
    assert [line.split() for line in told[1:]] == [["60.0", "a"], ["7.0", "d"]]


def test_where_nothing_takes_too_much_nothing_is_told(times):
    times.pytest_runtest_logreport(report("a", TOO_MUCH_S))
    assert times.told() == []


def test_what_a_process_takes_counts_while_it_lives_and_after_its_end():
    before = cpu_s()
    with subprocess.Popen([sys.executable, "-S", "-c", BURNS], stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        assert cpu_s() - before > 0.35
        process.communicate(b"\n")
    assert 0.35 < cpu_s() - before < 5


def test_every_test_of_this_run_is_measured(request):
    assert isinstance(request.config.pluginmanager.get_plugin("cpu-times"), CpuTimes)


def test_the_pages_name_the_limit():
    assert f"more than {TOO_MUCH_S:.0f} CPU seconds" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_all_kinds_of_input_but_some_are_slow_and_keep_their_names():
    kinds = slow_but({"a": 1, "b": 2, "c": 3}, ("b",))
    assert [one if isinstance(one, str) else (one.values, one.marks[0].name, one.id) for one in kinds] == [
        (("a",), "slow", None),
        "b",
        (("c",), "slow", None),
    ]
    with pytest.raises(AssertionError, match="found"):
        slow_but((1, 2), (3,))


def test_long_files_come_first_and_all_of_them_are_there(request):
    from conftest import LONG_FILES, pytest_collection_modifyitems

    folder = Path(__file__).parent
    assert [name for name in LONG_FILES if not (folder / name).exists()] == []
    names = ["a.py", "store/test_duplicates.py", "ingest/test_hard_dicom.py", "b.py", "ingest/test_hard_dicom.py"]
    items = [SimpleNamespace(path=folder / name, number=number) for number, name in enumerate(names)]
    pytest_collection_modifyitems(items)
    assert [item.number for item in items] == [2, 4, 1, 0, 3]
