"""Progress: plain lines where there is no terminal, rare ones, and always the last."""

from __future__ import annotations

import itertools
import time

import pytest

from maesil.progress import progress


def test_lines_are_rare_and_the_end_is_said(capfd):
    with progress({"build": "volumes"}) as report:
        for done in range(1, 1001):
            report("build", done, 1000)
    assert capfd.readouterr().err.splitlines() == ["build: 1000 of 1000 volumes"]


def test_long_work_says_something_now_and_then(capfd, monkeypatch):
    seconds = itertools.count(0.0, 4.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    with progress({"scan": "files"}) as report:
        for done in range(1, 10):
            report("scan", done, None)
    lines = capfd.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5 and lines[0].startswith("scan: ") and lines[0].endswith(" files")


def test_nothing_goes_to_standard_output(capfd):
    with progress({"a": "files", "b": "volumes"}) as report:
        report("a", 1, 1)
        report("b", 2, 2)
    assert capfd.readouterr().out == ""


def test_an_error_inside_passes_through():
    with pytest.raises(RuntimeError, match="inside"), progress({"a": "files"}):
        raise RuntimeError("inside")
