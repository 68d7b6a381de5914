"""Inputs whose author had not read `ingest`: each goes through the command line, and is scored in world space.

A twelfth of the cases is in the fast lane: the same ones, while they keep their names. All others are in the slow one.
`test_hard_dicom` and `test_hard_nifti` hold hundreds of inputs of the same kinds for the fast lane.
"""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import pytest
from conformance.cases import CASES
from conformance.judge import judge

LONG = ("all_48_orientations", "sparse_giants", "ten_phases")
LANES = [
    pytest.param(name, marks=pytest.mark.slow) if name in LONG or crc32(name.encode()) % 12 else name for name in CASES
]


@pytest.mark.parametrize("name", LANES)
def test_right_or_refused(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    assert judge(source, tmp_path, CASES[name](source)) == []
