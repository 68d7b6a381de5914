"""The Parquet tables say what the commits say, and can always be made again."""

from __future__ import annotations

import errno
import io
import threading

import pyarrow.parquet as pq
import pytest
from support.stores import add_volume, make_store, synthetic_hu

from maesil.store.index import SUPERPATCHES_KEY, VOLUMES_KEY, index_is_current, write_index
from maesil.store.local_storage import LocalStorage
from maesil.store.reader import SuperpatchReader
from maesil.store.shard import decode_superpatch
from maesil.store.store import Store
from maesil.store.verify import verify

KEYS = (VOLUMES_KEY, SUPERPATCHES_KEY)


@pytest.fixture
def store(tmp_path) -> Store:
    return make_store(tmp_path / "s.zarr", [(20, 33, 16), (16, 16, 40), (9, 9, 9)], superpatch=16)


def rows(store: Store, key: str) -> list[dict]:
    return pq.read_table(io.BytesIO(store.storage.read(key))).to_pylist()


def test_rows_equal_the_commits(store):
    volumes = store.volumes()
    found = rows(store, VOLUMES_KEY)
    assert [row["volume_id"] for row in found] == [v.volume_id for v in volumes]
    for row, volume in zip(found, volumes, strict=True):
        assert tuple(row[f"shape_{a}"] for a in "zyx") == volume.shape
        assert tuple(row[f"spacing_{a}"] for a in "zyx") == volume.spacing
        assert (row["group"], row["prefix"], row["hu_mean"]) == (volume.group, volume.prefix, volume.hu["mean"])
        assert row["superpatches"] == len(volume.superpatches)
    expected = [(v, patch) for v in volumes for patch in v.superpatches]
    for row, (volume, patch) in zip(rows(store, SUPERPATCHES_KEY), expected, strict=True):
        assert (row["volume_id"], (row["iz"], row["iy"], row["ix"])) == (volume.volume_id, patch.index)
        for name in ("path", "offset", "length", "crc32c", "valid", "body", "air"):
            assert row[name] == getattr(patch, name)
        assert (row["edge"], row["codec"]) == (volume.tile, volume.codec)


def test_a_row_alone_is_enough_to_read_a_superpatch(store):
    import numpy as np

    from maesil.store.records import Superpatch

    row = rows(store, SUPERPATCHES_KEY)[3]
    fields = ("path", "offset", "length", "crc32c", "valid", "body", "air")
    patch = Superpatch((row["iz"], row["iy"], row["ix"]), *(row[name] for name in fields))
    out = np.empty((row["edge"],) * 3, np.int16)
    decode_superpatch(store.storage, patch, row["codec"], out, "here")
    np.testing.assert_array_equal(out, SuperpatchReader(store).read_superpatch(row["volume_id"], patch.index))


def test_made_again_it_is_identical(store):
    before = [store.storage.read(key) for key in KEYS]
    for key in KEYS:
        store.storage.remove(key)
    assert write_index(store) == (3, sum(len(v.superpatches) for v in store.volumes()))
    assert [store.storage.read(key) for key in KEYS] == before


def test_an_empty_store_has_an_empty_index(tmp_path):
    store = make_store(tmp_path / "s", [])
    assert rows(store, VOLUMES_KEY) == rows(store, SUPERPATCHES_KEY) == []
    assert index_is_current(store)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "of another state"])
def test_a_stale_or_damaged_index_is_known(store, key, damage):
    assert index_is_current(store)
    old = store.storage.read(key)
    if damage == "missing":
        store.storage.remove(key)
    elif damage == "of another state":  # as after a kill between the two files
        add_volume(store, synthetic_hu((9, 9, 9), 5), name="new")
        assert not index_is_current(store)
        write_index(store)
        store.storage.put(key, old)
    else:
        store.storage.put(key, old[: len(old) // 2] if damage == "cut" else b"")
    assert not index_is_current(store)
    write_index(store)
    assert index_is_current(store)


def test_a_new_generation_makes_the_index_stale(store):
    add_volume(store, synthetic_hu((9, 9, 9), 5), name="volume-2")
    assert len(store.volumes()) == 3
    assert not index_is_current(store)


@pytest.mark.parametrize("puts", range(5))
def test_an_index_cut_off_anywhere_is_no_damage_and_is_not_used(store, monkeypatch, puts):
    """A full disk, or a kill, after so many files of the index."""
    write_index(store)
    add_volume(store, synthetic_hu((32, 32, 32), 100 + puts), name=f"added {puts}")
    put, done = LocalStorage.put, []

    def put_some(self, key, data):
        if len(done) == puts:
            raise OSError(errno.ENOSPC, "no room")
        done.append(key)
        put(self, key, data)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "put", put_some)
        if puts < 4:
            with pytest.raises(OSError):
                write_index(store)
        else:
            write_index(store)
    assert verify(store).problems == ()
    assert index_is_current(store) == (puts == 4)


def test_two_writers_end_with_everything_indexed(tmp_path):
    store = make_store(tmp_path / "s", [], superpatch=8)

    def ingest(worker: int) -> None:
        for number in range(3):
            add_volume(store, synthetic_hu((8, 8, 8), number), name=f"{worker}-{number}")
            write_index(store)

    threads = [threading.Thread(target=ingest, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index_is_current(store)
    assert len(rows(store, VOLUMES_KEY)) == 12
