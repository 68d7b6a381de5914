"""A part leaves its rows on the disk, whatever becomes of it."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from gpu.part import NO_GPU, Given, run_part


@pytest.fixture
def part(monkeypatch):
    """A part of the name ``of_a_test`` whose rows a test gives."""

    def made(rows):
        module = ModuleType("gpu.of_a_test")
        module.rows = rows
        monkeypatch.setitem(sys.modules, "gpu.of_a_test", module)
        return "of_a_test"

    return made


def given(tmp_path) -> Given:
    return Given(tmp_path / "store.zarr", tmp_path, seconds=60)


def test_a_row_is_on_the_disk_before_the_next_is_measured(part, tmp_path):
    path = tmp_path / "found.json"

    def rows(_):
        yield {"us": 1.0}
        assert json.loads(path.read_text()) == {"state": "running", "rows": [{"us": 1.0}]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_part(part(rows), given(tmp_path), path)


@pytest.mark.parametrize(
    ("error", "state"), [(None, "done"), (ValueError("two\nlines"), "failed: ValueError: two lines")]
)
def test_the_state_says_how_it_ended(part, tmp_path, error, state):
    def rows(_):
        yield {"us": 1.0}
        if error:
            raise error

    assert run_part(part(rows), given(tmp_path), tmp_path / "found.json") == state
    assert json.loads((tmp_path / "found.json").read_text()) == {"state": state, "rows": [{"us": 1.0}]}


def test_a_part_that_needs_a_gpu_says_so(part, tmp_path):
    def rows(of):
        of.require_gpu()
        yield {}

    assert run_part(part(rows), given(tmp_path), tmp_path / "found.json") == NO_GPU
