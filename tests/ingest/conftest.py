"""The sources that tests of whole runs share."""

from __future__ import annotations

import pytest
from support.sources import (
    Workplace,
    write_sources,
)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Workplace:
    """The sources, ingested once, undisturbed. Tests only read it."""
    place = Workplace(tmp_path_factory.mktemp("first"))
    write_sources(place.sources)
    summary = place.ingest()
    assert len(summary.committed) == 3
    return place


@pytest.fixture
def place(first, tmp_path) -> Workplace:
    """A copy of sources and store of one's own."""
    return first.copy_all(tmp_path)
