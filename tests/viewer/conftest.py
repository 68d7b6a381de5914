"""A store of two phantoms, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.viewer_phantom import serving, store_of_phantoms

from maesil.store.store import Store
from maesil.viewer.server import ViewServer


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Store:
    return store_of_phantoms(tmp_path_factory.mktemp("phantoms") / "phantoms.zarr")


@pytest.fixture(scope="session")
def ids(store) -> dict[str, str]:
    turned, straight = sorted(store.volumes(), key=lambda volume: -len(volume.notes))
    return {"turned": turned.volume_id, "straight": straight.volume_id}


@pytest.fixture(scope="session")
def server(store) -> Iterator[ViewServer]:
    yield from serving(store)
