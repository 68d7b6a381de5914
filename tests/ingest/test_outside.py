"""Inputs whose author had not read `ingest`: each goes through the command line, and is scored in world space."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance.cases import CASES
from conformance.judge import judge


@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    assert judge(source, tmp_path, CASES[name](source)) == []
