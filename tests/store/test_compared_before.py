"""Copies of scans in a store that grows: only what is new is compared, and the patients are those of a new index."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from support.stores import add_volume, make_store

from maesil.store import duplicates
from maesil.store.index import CHECKSUMS_KEY, VOLUMES_KEY, patients, write_index
from maesil.store.store import Store

SPACING = (6.0, 6.0, 6.0)


def scan(seed: int) -> np.ndarray:
    """A ball of smooth noise in air, int16 HU ``[z, y, x]``."""
    coarse = np.random.default_rng(seed).normal(0, 150, (10, 10, 10))
    away = np.hypot(np.hypot(*np.ogrid[-20:20, -20:20][:2])[None], np.arange(-20, 20)[:, None, None])
    return np.where(away < 18, np.kron(coarse, np.ones((4, 4, 4))), -1000).astype(np.int16)


def add(store: Store, name: str, group: str, seed: int) -> None:
    add_volume(store, scan(seed), name=name, group=group, spacing=SPACING)


@pytest.fixture
def store(tmp_path) -> Store:
    """Two patients, ``a`` and ``b``, that ``x`` holds a scan of each of; an index says that all are one."""
    store = make_store(tmp_path / "s", [], superpatch=64)
    for name, group, seed in (("0", "a", 1), ("1", "b", 2), ("2", "x", 1), ("3", "x", 2), ("4", "c", 3)):
        add(store, name, group, seed)
    write_index(store)
    assert patients([store]) == {"a": "a", "b": "a", "x": "a", "c": "c"}
    return store


@pytest.fixture
def compared(monkeypatch) -> list[int]:
    """How many smaller ones each thumbnail was compared with, since the fixture began."""
    found: list[int] = []
    real = duplicates._to_compare

    def noting(*given) -> Iterator:
        for rank, others in real(*given):
            found.append(len(others))
            yield rank, others

    monkeypatch.setattr(duplicates, "_to_compare", noting)
    return found


def anew(store: Store) -> dict[str, str]:
    """The patients, each two volumes compared."""
    store.storage.remove(CHECKSUMS_KEY)
    return patients([store])


def test_an_index_compares_what_came_since_the_last_one(store, compared):
    add(store, "5", "d", 3)
    add(store, "6", "e", 4)
    write_index(store)
    assert sum(compared) == 5 + 6  # the new ones with all others, and with each other
    assert patients([store]) == {"a": "a", "b": "a", "x": "a", "c": "c", "d": "c", "e": "e"} == anew(store)
    assert sum(compared) == 5 + 6 + 7 * 6 // 2


def test_a_volume_that_is_gone_joins_nobody_any_more(store, compared):
    gone = next(v for v in store.volumes() if v.group == "x")
    store.forget(gone.volume_id)
    left = {v.group for v in store.volumes()}
    write_index(store)
    found = patients([store])
    assert found == anew(store) and len(set(found.values())) == 3 and left == set("abcx")


def test_two_stores_are_compared_with_each_other_alone(store, compared, tmp_path):
    other = make_store(tmp_path / "t", [], superpatch=64)
    add(other, "7", "c", 3)
    add(other, "8", "g", 2)
    write_index(other)
    compared.clear()
    assert patients([store, other]) == {"a": "a", "b": "a", "x": "a", "g": "a", "c": "c"}
    assert sum(compared) == 5 * 2


@pytest.mark.parametrize("damage", ["altered", "missing", "another way"])
def test_an_index_that_cannot_be_believed_is_not(store, compared, monkeypatch, damage):
    data = store.storage.read(VOLUMES_KEY)
    if damage == "another way":
        monkeypatch.setattr("maesil.store.index._COPIES_VERSION", b"another")
    else:
        store.storage.put(VOLUMES_KEY, data[:-1] + b"?" if damage == "altered" else b"")
    add(store, "5", "d", 3)
    assert patients([store])["d"] == "c"
    assert sum(compared) == 6 * 5 // 2
