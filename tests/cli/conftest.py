"""What the tests of the command line share: a home of their own, sources, a store."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from support.command_line import SMALL, ingest, run
from support.sources import write_sources
from support.stores import make_store

from maesil.store.store import Store


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> dict[str, str]:
    """No test touches the user's own key and cache."""
    root = str(tmp_path_factory.mktemp("home"))
    return {"HOME": root, "XDG_CONFIG_HOME": f"{root}/config", "XDG_CACHE_HOME": f"{root}/cache"}


@pytest.fixture(autouse=True)
def own_home(home, monkeypatch):
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MAESIL_CACHE", raising=False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_sources(root)
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", [(20, 33, 17), (16, 16, 16)], superpatch=16).path


@pytest.fixture(scope="module")
def undisturbed(sources, tmp_path_factory):
    """An ingest of the sources from a disk to a disk, and the key it was made with: what a bucket must give, too."""
    folder = tmp_path_factory.mktemp("local")
    code, _, stderr = run(*ingest(sources, folder / "store.zarr", "--key-file", folder / "key", *SMALL))
    assert code == 0, stderr
    return Store.open(folder / "store.zarr"), folder / "key"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder, a folder for temporary files and a memory of its own."""
    for name in ("tmp", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("MAESIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    tempfile.tempdir = None
