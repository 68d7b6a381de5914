"""The lane itself, on a program of one line: which bugs it lets through, and which it reports."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from planted.lane import Bug, misplaced

TESTS = Path(__file__).parents[1]
RUN = """
import sys
from pathlib import Path
from planted.lane import Bug, run

sys.exit(run([Bug("maesil/sums.py", *words.split("|")) for words in sys.argv[2:]], Path(sys.argv[1])))
"""


FEW_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p pytest_timeout"}
"""All that are installed take a second in each child."""


@pytest.fixture
def root(tmp_path):
    """A tree as the lane copies it."""
    for name, text in {
        "maesil/__init__.py": "",
        "maesil/sums.py": "def add(a, b):\n    return a + b  # and nothing else\n",
        "tests/test_sums.py": "from maesil.sums import add\n\n\ndef test_sum():\n    assert add(2, 1) == 3\n\n\n"
        "def test_zero():\n    assert add(0, 0) == 0\n\n\ndef test_wrong():\n    assert add(1, 1) == 3\n",
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def run(root, *bugs):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(root), *bugs], env={**os.environ, "PYTHONPATH": str(TESTS), **FEW_PLUGINS},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_a_bug_passes_that_its_test_sees_and_no_other(root):
    """Tests: one that sees it, one that does not, none; and a bug that is no bug but a program that cannot run."""
    before = (root / "maesil/sums.py").read_text(encoding="utf-8")
    expected = {
        "a + b|a - b|test_sums.py::test_sum": "",
        "a + b|2 * a + b|test_sums.py::test_sum": "",
        "a + b|a - b|test_sums.py::test_zero": "the test passes",
        "a + b|a + c|test_sums.py::test_sum": "breaks the program, so plant another: NameError",
    }
    wrong, said = run(root, *expected)
    assert wrong == 2 and "4 bugs planted, 2 wrong" in said, said
    for words, told in expected.items():
        old, new, test = words.split("|")
        (line,) = [line for line in said.splitlines() if f"{old!r} -> {new!r} ({test})" in line]
        assert line.partition(f"({test})")[2].removeprefix(": ").startswith(told) and (not told) == line.endswith(")")
    assert (root / "maesil/sums.py").read_text(encoding="utf-8") == before


@pytest.mark.slow
def test_tests_that_fail_without_a_bug_or_are_not_there_are_reported(root):
    wrong, said = run(root, "a + b|a - b|test_sums.py::test_wrong")
    assert wrong == 1 and "a test fails without a bug" in said and "assert add(1, 1) == 3" in said
    wrong, said = run(root, "a + b|a - b|test_sums.py::test_other")
    assert wrong == 2 and said.count("no test ran on the copy") == 2


@pytest.mark.parametrize(("old", "found"), [("a * b", 0), ("n", 4)])
def test_a_text_that_does_not_occur_exactly_once_is_reported(root, old, found):
    right = Bug("maesil/sums.py", "a + b", "a - b", "test_sums.py::test_sum")
    (told,) = misplaced([right, replace(right, old=old)], root)
    assert told == f"maesil/sums.py: expected once, found {found} times: {old!r}; plant the bug anew"
