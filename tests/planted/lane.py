"""The planted-bug lane: plants the bugs of `planted.bugs` in copies of the source, one at a time; a test must see each.

`make planted-bugs` runs all of them; ``python -m planted.lane WORD...`` those whose line holds one of the words.

Heavy libraries are imported once. For each bug a child is forked, which imports maesil from the copy with the bug and
runs one test there. The lane ends with 1 where a test passes with its bug, where a text to replace does not occur
exactly once, and where a bug only breaks the program: a test that meets a misspelt name shows nothing.
"""

from __future__ import annotations

import compileall
import gc
import importlib
import os
import py_compile
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from support.planting import planted

ROOT = Path(__file__).parents[2]
COPIED = ("maesil", "ingest", "kernels", "cache", "tests", "docs", "pyproject.toml")
HEAVY = (
    "hypothesis", "matplotlib.pyplot", "nibabel", "rich.progress", "safetensors.torch", "scipy.sparse.linalg",
    "scipy.stats", "sklearn.linear_model", "sklearn.pipeline", "torch._dynamo", "torch.utils.flop_counter",
    "torch.utils.tensorboard", "typer", "zarr",
)  # fmt: skip
"""Libraries that tests import, that no bug touches, and that start no thread, which a fork would not take along."""
AT_ONCE = 2
TOO_LONG = 120
"""Seconds."""
SEEN, NOT_SEEN, NO_TEST = range(3)
BROKEN = (AttributeError, ImportError, NameError, SyntaxError)
"""What a bug must not raise."""


@dataclass(frozen=True)
class Bug:
    """One text of a file in place of another, and the test that must fail with it."""

    file: str
    old: str
    new: str
    test: str
    """By its node id below ``tests/``."""

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} -> {self.new!r} ({self.test})"


def bugs(file: str, tests: str, *changes: tuple[str, str, str]) -> list[Bug]:
    """Return bugs of one file that tests of another see: a text, what takes its place, the name of the test."""
    return [Bug(file, old, new, f"{tests}::{test}") for old, new, test in changes]


class Watch:
    """A plugin of pytest: whether a test ran, and whether the bug broke more than it should."""

    ran, told = False, ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran |= report.when == "call"

    def pytest_exception_interact(self, call: pytest.CallInfo[None]) -> None:
        assert call.excinfo is not None
        said = call.excinfo.exconly()
        if call.excinfo.errisinstance(BROKEN) or "from pytest-timeout" in said:
            self.told = f"breaks the program, so plant another: {said}"


def copy_source(root: Path, folder: Path) -> None:
    """Copy what tests need, compiled so that a file that changes is compiled anew whatever its time says."""
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (root / name).exists():
            shutil.copy(root / name, folder / name)
    compileall.compile_dir(folder, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests of a copy, in a process that has not imported maesil yet; return the outcome and what is wrong."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("support", "planted")]:
        del sys.modules[name]  # those of the copy will be imported
    watch = Watch()
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--timeout={TOO_LONG}", f"--rootdir={folder}"]
    options += [f"--basetemp={folder}/temporary"]  # else pytest tidies up what other runs have left
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # libraries came before pytest
    code = pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[watch])
    source = sys.modules["maesil"].__file__ if "maesil" in sys.modules else None
    if watch.told or not watch.ran or not Path(source or "").is_relative_to(folder):
        return NO_TEST, watch.told or "no test ran on the copy"
    return (NOT_SEEN, "the test passes") if code == pytest.ExitCode.OK else (SEEN, "")


@dataclass(frozen=True)
class Child:
    """A process that runs the test of a bug in a copy, or all tests in a copy without any (no bug)."""

    bug: Bug | None
    folder: Path
    began: float

    def judged(self, result: int) -> str:
        """Return what is wrong; nothing if all is as it should be."""
        if result == (NOT_SEEN if self.bug is None else SEEN):
            return ""
        told, said = ((self.folder / name).read_text(encoding="utf-8") for name in ("told", "said"))
        return told if self.bug else f"a test fails without a bug: {told}\n{said}"


def fork(folder: Path, tests: Sequence[str]) -> int:
    """Run tests of a copy in a child that ends with `SEEN`, `NOT_SEEN` or `NO_TEST`; return its number."""
    if child := os.fork():
        return child
    result, told = NO_TEST, "the child ended early"
    try:
        with (folder / "said").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            result, told = run_tests(folder, tests)
            sys.stdout.flush()
    except BaseException:
        told = traceback.format_exc()
    finally:
        (folder / "told").write_text(told)
        os._exit(result)


def judgements(bugs: Sequence[Bug], root: Path, place: Path) -> Iterator[tuple[Bug | None, str, float]]:
    """Yield each bug with what is wrong and the seconds it took, and first of all (None) the tests without any."""
    copy_source(root, place / "whole")
    free = [Path(shutil.copytree(place / "whole", place / str(n), symlinks=True)) for n in range(AT_ONCE)]
    waiting: list[Bug | None] = [*reversed(bugs), None]
    children: dict[int, Child] = {}
    while waiting or children:
        while waiting and free:
            bug, folder = waiting.pop(), free.pop()
            if bug is not None:
                text = (place / "whole" / bug.file).read_text(encoding="utf-8")
                (folder / bug.file).write_text(planted(text, bug.old, bug.new, bug.file), encoding="utf-8")
            tests = sorted({one.test for one in bugs}) if bug is None else [bug.test]
            children[fork(folder, tests)] = Child(bug, folder, time.monotonic())
        number, status = os.wait()
        child = children.pop(number)
        yield child.bug, child.judged(os.waitstatus_to_exitcode(status)), time.monotonic() - child.began
        if child.bug is not None:
            shutil.copy(place / "whole" / child.bug.file, child.folder / child.bug.file)
        free.append(child.folder)


def misplaced(bugs: Sequence[Bug], root: Path) -> list[str]:
    """Return a line for each bug whose text does not occur exactly once."""
    told = []
    for bug in bugs:
        try:
            planted((root / bug.file).read_text(encoding="utf-8"), bug.old, bug.new, bug.file)
        except (ValueError, OSError) as error:
            told.append(str(error))
    return told


def run(bugs: Sequence[Bug], root: Path = ROOT) -> int:
    """Plant the bugs, some side by side, and print what is wrong; return how many were not seen as they should be."""
    if told := misplaced(bugs, root):
        print("\n".join(told))
        return len(told)
    wrong, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for bug, told_of_it, seconds in judgements(bugs, root, Path(place)):
            wrong += bool(told_of_it)
            print(f"{seconds:5.1f} s  {bug or 'no bug'}{': ' * bool(told_of_it)}{told_of_it}", flush=True)
    print(f"{len(bugs)} bugs planted, {wrong} wrong, {time.monotonic() - began:.0f} s")
    return wrong


def load_libraries() -> None:
    """Import what takes long, and pytest's plugins, once for all children."""
    for name in HEAVY:
        importlib.import_module(name)
    for plugin in entry_points(group="pytest11"):
        plugin.load()


def main(words: Sequence[str]) -> int:
    """Run the lane over the bugs whose line holds one of the words; over all without words."""
    from planted.bugs import BUGS

    bugs = [bug for bug in BUGS if not words or any(word in str(bug) for word in words)]
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch; two children use two cores
    load_libraries()
    gc.freeze()  # children need not look through it again
    wrong = run(bugs)
    gc.unfreeze()
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
