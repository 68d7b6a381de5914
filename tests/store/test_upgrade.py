"""An archived store of version 1 becomes one of today: voxels stay byte for byte, and nothing is lost on the way."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.lanes import slow_but
from support.ome_reader import OmeImage
from support.stores import make_store
from typer.testing import CliRunner

from maesil.cli import app
from maesil.errors import EXIT_STORE
from maesil.store.amend import amended
from maesil.store.garbage import find_garbage, remove_garbage
from maesil.store.index import index_is_current
from maesil.store.reader import SuperpatchReader
from maesil.store.store import FORMAT_VERSION, Store
from maesil.store.upgrade import is_current, upgrade
from maesil.store.verify import verify

ARCHIVE = Path(__file__).parents[1] / "archive" / "store-1.tar.gz"


@pytest.fixture
def archive(tmp_path) -> Path:
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


def voxels(store: Store) -> dict[str, bytes]:
    """The bytes of every shard of level 0 and of every map, by volume and name."""
    found = {}
    for volume in store.volumes():
        for key in store.storage.list(volume.prefix):
            name = key.removeprefix(f"{volume.prefix}/")
            if name.startswith(("0/", "valid/", "body/", "thumbnail/")):
                found[f"{volume.volume_id}/{name}"] = store.storage.read(key)
    return found


@pytest.mark.parametrize("codec", ["fast", "compact", "raw"])
def test_an_archived_store_keeps_every_byte_of_its_voxels(archive, codec):
    store = Store.open(archive / f"{codec}.zarr")
    before, fingerprint, old = voxels(store), store.fingerprint, store.volumes()
    assert store.version == 1 and not any(is_current(store.storage, volume) for volume in old)
    done = upgrade(store)
    assert (done.volumes, done.before, done.problems) == (2, 0, ())
    store = Store.open(store.path)
    assert store.version == FORMAT_VERSION and store.fingerprint == fingerprint
    assert voxels(store) == before
    assert verify(store).problems == () and index_is_current(store)
    for volume, was in zip(store.volumes(), old, strict=True):
        image = OmeImage(store.path / volume.prefix)
        np.testing.assert_allclose(image.lps((0, 0, 0)), volume.affine[:3, 3], rtol=0, atol=1e-9)
        shard = volume.superpatches[0].path
        assert (store.path / shard).samefile(store.path / was.superpatches[0].path), "no second copy on the disk"
        reader = SuperpatchReader(store)
        np.testing.assert_array_equal(image.hu(), reader.read_region(volume.volume_id, (0, 0, 0), volume.shape))


def test_a_second_upgrade_has_nothing_to_do(archive):
    store = Store.open(archive / "raw.zarr")
    upgrade(store)
    commits = store.live_commits()
    done = upgrade(store)
    assert (done.volumes, done.before) == (0, 2) and store.live_commits() == commits


def test_what_was_replaced_goes_and_the_volume_stays(archive):
    store = Store.open(archive / "raw.zarr")
    before = voxels(store)
    upgrade(store)
    for garbage in find_garbage(store, older_than_hours=-1):
        remove_garbage(store, garbage)
    assert voxels(store) == before and verify(store).problems == ()


def test_levels_of_an_upgrade_are_those_of_an_ingest(tmp_path):
    """A store of today, told that its levels are missing, gets the same bytes again."""
    store = make_store(tmp_path / "s", [(70, 81, 90)], superpatch=16)
    (volume,) = store.volumes()
    document = store.storage.read(f"{volume.prefix}/zarr.json")
    levels = {name: crc for name, crc in volume.documents.items() if name[0] in "123456789"}
    assert levels
    plain = document.replace(b'"version":"0.6"', b'"version":"0.5"').replace(b'"version": "0.6"', b'"version": "0.5"')
    assert plain != document
    bare = amended(store, volume, ("zarr.json", "1/"), lambda prefix: store.storage.put(f"{prefix}/zarr.json", plain))
    assert bare is not None and levels.items() - bare.documents.items()
    assert upgrade(store).volumes == 1
    (volume,) = store.volumes()
    assert levels.items() <= volume.documents.items() and verify(store).problems == ()
    assert store.storage.read(f"{volume.prefix}/zarr.json") == document


def test_a_damaged_volume_is_said_and_stays_as_it_is(archive):
    store = Store.open(archive / "raw.zarr")
    first = store.volumes()[0]
    (store.path / first.prefix / "zarr.json").write_bytes(b"{")
    result = CliRunner().invoke(app, ["store", "upgrade", str(store.path)])
    assert result.exit_code == EXIT_STORE and first.volume_id in result.output
    store = Store.open(store.path)
    assert store.volumes()[0] == first and is_current(store.storage, store.volumes()[1])
    assert store.storage.folders(f"volumes/{first.volume_id[:2]}/{first.volume_id}") == [first.attempt]


@pytest.mark.parametrize("name", ["0/c/0/0/0", "valid/zarr.json", "body/c/0/0/0"])
def test_damage_of_old_is_damage_after_an_upgrade(archive, name):
    store = Store.open(archive / "raw.zarr")
    path = store.path / store.volumes()[0].prefix / name
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    assert (before := verify(store).problems)
    upgrade(store)
    assert len(verify(Store.open(store.path)).problems) == len(before)


def test_a_level_that_is_damaged_or_missing_is_found_and_training_reads_on(tmp_path):
    store = make_store(tmp_path / "s", [(70, 40, 40)], superpatch=16)
    (volume,) = store.volumes()
    voxels = SuperpatchReader(store).read_region(volume.volume_id, (0, 0, 0), volume.shape)
    (shard,) = store.storage.list(f"{volume.prefix}/1/c")
    path = store.path / shard
    data = path.read_bytes()
    for damaged in (None, data[:-9], data[:7] + bytes([data[7] ^ 1]) + data[8:]):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        (problem,) = verify(store).problems
        assert shard in problem
        found = SuperpatchReader(Store.open(store.path)).read_region(volume.volume_id, (0, 0, 0), volume.shape)
        np.testing.assert_array_equal(found, voxels)
        path.write_bytes(data)


def test_whoever_commits_first_wins(archive):
    store = Store.open(archive / "raw.zarr")
    volume = store.volumes()[0]

    def other_process(prefix: str) -> None:
        store.commit(volume, anew=True)

    assert amended(store, volume, (), other_process) is None
    live = store.live(volume.volume_id)
    assert live is not None and (live.generation, live.attempt) == (volume.generation + 1, volume.attempt)
    assert store.storage.folders(f"volumes/{volume.volume_id[:2]}/{volume.volume_id}") == [volume.attempt]


KILLED = """
import os, sys
from maesil.store.local_storage import LocalStorage
from maesil.store.store import Store
from maesil.store.upgrade import upgrade
writes = iter(range(int(sys.argv[2])))
def counted(method):
    def run(*args, **kwargs):
        if next(writes, None) is None:
            os._exit(9)
        return method(*args, **kwargs)
    return run
for name in ("put", "put_new", "put_parts", "link"):
    setattr(LocalStorage, name, counted(getattr(LocalStorage, name)))
upgrade(Store.open(sys.argv[1]))
"""


@pytest.mark.parametrize("writes", slow_but((1, 2, 9, 14, 20), (9,)))
def test_killed_anywhere_the_store_is_whole_and_the_upgrade_goes_on(archive, writes):
    """The process ends without a word before one of its writes."""
    store = Store.open(archive / "raw.zarr")
    before = voxels(store)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(store.path), str(writes)], check=False)
    assert ended.returncode == 9
    store = Store.open(store.path)
    assert voxels(store) == before and verify(store).problems == ()
    upgrade(store)
    assert voxels(store) == before and verify(store).problems == ()
    assert all(is_current(store.storage, volume) for volume in store.volumes()) and index_is_current(store)
