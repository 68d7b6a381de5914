"""Progress: plain lines where there is no terminal, rare ones, and always the last."""

from __future__ import annotations

import itertools
import time

import pytest

from maesil.progress import Tally, progress


def test_lines_are_rare_and_the_end_is_said(capfd):
    with progress({"build": "volume"}) as report:
        for done in range(1, 1001):
            report("build", done, 1000)
    assert capfd.readouterr().err.splitlines() == ["build: 1000 of 1000 volumes"]


def test_long_work_says_something_now_and_then(capfd, monkeypatch):
    seconds = itertools.count(0.0, 4.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    with progress({"scan": "file"}) as report:
        for done in range(1, 10):
            report("scan", done, None)
    lines = capfd.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5 and lines[0].startswith("scan: ") and lines[0].endswith(" files")


# After three files, 8 s for two of them: six more take 24 s.
LONG_LOOK = [
    "scan: 3 of 9 files, about 24 s left",
    "scan: 6 of 9 files, about 12 s left",
    "scan: 9 of 9 files",
]


@pytest.mark.parametrize("seconds_per_call, looked", [(0.01, []), (4.0, LONG_LOOK)])
def test_a_quick_look_says_nothing_and_a_long_one_the_time_left(capfd, monkeypatch, seconds_per_call, looked):
    seconds = itertools.count(0.0, seconds_per_call)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    with progress({"scan": "file", "build": "volume"}, silent_when_quick=["scan"]) as report:
        for done in range(1, 10):
            report("scan", done, 9)
        report("build", 1, 1)
    assert capfd.readouterr().err.splitlines() == [*looked, "build: 1 of 1 volume"]


def test_nothing_goes_to_standard_output(capfd):
    with progress({"a": "file", "b": "volume"}) as report:
        report("a", 1, 1)
        report("b", 2, 2)
    assert capfd.readouterr().out == ""


def test_an_error_inside_passes_through():
    with pytest.raises(RuntimeError, match="inside"), progress({"a": "file"}):
        raise RuntimeError("inside")


def test_one_is_counted_as_one(capfd):
    with progress({"build": "volume", "scan": "file"}) as report:
        report("build", 1, 1)
    assert capfd.readouterr().err == "build: 1 of 1 volume\n"


def test_a_line_is_not_broken_at_80_columns(capfd):
    with progress(
        {"a stage with a name that no one would choose": "thing of which there are more than one in a file"}
    ) as report:
        report("a stage with a name that no one would choose", 7, 7)
    (line,) = capfd.readouterr().err.splitlines()
    assert len(line) > 80


def test_a_tally_counts_over_all_parts_of_a_work(capfd):
    with progress({"predict": "crop", "score": "slice"}) as report:
        tally = Tally(report, {"predict": 5, "score": 2})
        for count in (2, 3):
            tally.add("predict", count)
            tally.add("score", 1)
    assert capfd.readouterr().err.splitlines() == ["predict: 5 of 5 crops", "score: 2 of 2 slices"]
    Tally().add("predict", 1)  # nobody listens
