"""What became wrong in public bug reports of this job: right or refused, never wrong in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance.public import ARCHIVE, Case, faults, names, unpack
from support.lanes import slow_but

pytestmark = pytest.mark.skipif(not ARCHIVE.is_file(), reason="MAESIL_TEST_DATA holds no public_cases.tar.gz")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return unpack(tmp_path_factory.mktemp("public"))


@pytest.mark.parametrize("name", slow_but(names(), names()[::2]))
def test_right_or_refused(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    assert faults(cases[name], tmp_path) == []
