"""What the tests of whole runs share: a store, and a run that nothing disturbed. Neither is written to."""

from __future__ import annotations

import pytest
from support.stores import make_store
from support.training import pictured, run


@pytest.fixture(scope="module", autouse=True)
def plain(plain_runs):
    """Nearly all tests here train, and few look at a picture."""


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    make_store(path, [(32, 40, 36), (40, 32, 33), (32, 32, 48)], superpatch=32)
    return path


@pytest.fixture(scope="session")
def undisturbed(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pictured():
        return out, *run(store, out)
