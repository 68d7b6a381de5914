"""Records appear whole, once, or not at all, whoever else writes at the same time: on a disk and in object storage."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from support.lanes import slow_but

from maesil.errors import ResourceError, StoreError
from maesil.store.backends import open_storage
from maesil.store.local_storage import LocalStorage

KEYS = [f"a/b/record-{number}.json" for number in range(12)]


@pytest.fixture(params=["disk", "objects"])
def place(request, tmp_path):
    """Where a storage lies: a folder of this machine, and a folder in a bucket of a real server."""
    return str(tmp_path) if request.param == "disk" else f"s3://{request.getfixturevalue('bucket')}/some/store.zarr"


@pytest.fixture
def storage(place):
    return open_storage(place)


def _claim_all(root: str, writer: int) -> list[str]:
    """Try to write every record first; return those this writer won."""
    storage = open_storage(root)
    return [key for key in KEYS if storage.put_new(key, _content(writer))]


def _take(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def _content(writer: int) -> bytes:
    return f"{writer}:".encode() + bytes([writer]) * 200_000


@pytest.mark.parametrize("pool", slow_but(("threads", "processes"), ("threads",)))
def test_one_of_eight_writers_wins_each_record(place, pool):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maesil.store.backends"])
    start = {"mp_context": context, "initializer": _take, "initargs": (dict(os.environ),)}
    with ThreadPoolExecutor(8) if pool == "threads" else ProcessPoolExecutor(8, **start) as executor:
        won = list(executor.map(_claim_all, [place] * 8, range(8)))
    assert sorted(key for keys in won for key in keys) == sorted(KEYS)
    for writer, keys in enumerate(won):
        for key in keys:
            assert open_storage(place).read(key) == _content(writer)
    assert list(open_storage(place).list("a")) == sorted(KEYS)
    assert not list(open_storage(place).temporaries())


@pytest.mark.parametrize("replacing", [False, True])
def test_a_reader_never_sees_half_a_record(storage, replacing):
    stop = threading.Event()
    sizes = set()

    def watch() -> None:
        while not stop.is_set():
            for key in storage.list("a"):
                sizes.add(len(storage.read(key)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(30):
        if replacing:
            storage.put("a/same", bytes(500_000))
        else:
            storage.put_new(f"a/{number}", bytes(500_000))
    stop.set()
    watcher.join()
    assert sizes <= {500_000}
    assert [size for size in map(storage.size, storage.list("a")) if size != 500_000] == []


def test_put_replaces_and_put_new_does_not(storage):
    assert storage.put_new("r", b"first")
    assert not storage.put_new("r", b"second")
    assert storage.read("r") == b"first"
    storage.put("r", b"third")
    assert storage.read("r") == b"third"
    assert list(storage.list("")) == ["r"]


def test_a_writer_that_died_leaves_nothing_listed(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.put_new("c/one", b"1")
    (tmp_path / "c" / ".tmp-0123").write_bytes(b"ha")  # what a kill between write and link leaves
    assert list(storage.list("c")) == ["c/one"]


def test_list_is_sorted_and_recursive(storage):
    keys = ["c/b/2", "c/b/10", "c/a/1", "c/b/d/0"]
    for key in keys:
        storage.put_new(key, b"")
    assert list(storage.list("c")) == ["c/a/1", "c/b/10", "c/b/2", "c/b/d/0"]
    assert list(storage.list("nothing/here")) == []


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)
    storage.put_new("c/one", b"1")
    real = os.scandir

    def forbidden(path):
        if Path(path).name == "c":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", forbidden)  # tests may run as root, who may list everything
    with pytest.raises(PermissionError):
        list(storage.list("c"))


def test_read_range_reads_exactly_what_was_asked(storage):
    data = os.urandom(1000)
    storage.put_new("f", data)
    assert storage.read_range("f", 100, 50) == data[100:150]
    assert storage.read_range("f", 0, 1000) == data
    assert storage.size("f") == 1000


@pytest.mark.parametrize(("offset", "length"), [(0, 1001), (999, 2), (1000, 1), (5000, 10)])
def test_read_range_beyond_the_end_is_damage(storage, offset, length):
    storage.put_new("f", bytes(1000))
    with pytest.raises(StoreError, match=r"the file was cut"):
        storage.read_range("f", offset, length)


@pytest.mark.parametrize("key", ["missing", "folder", "file/below"])
def test_what_is_no_file_is_damage(tmp_path, key):
    storage = LocalStorage(tmp_path)
    (tmp_path / "folder").mkdir()
    storage.put_new("file", b"x")
    with pytest.raises(StoreError, match=key.split("/")[0]):
        storage.read(key)
    with pytest.raises(StoreError, match=key.split("/")[0]):
        storage.read_range(key, 0, 1)


@pytest.mark.parametrize("errno", [28, 122])
@pytest.mark.parametrize("put", ["put", "put_new"])
def test_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, errno, put):
    def full(descriptor):
        raise OSError(errno, os.strerror(errno))

    storage = LocalStorage(tmp_path)
    storage.put_new("c/one", b"1")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        getattr(storage, put)("c/two", b"2")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["one"]


@pytest.mark.parametrize("errno", [28, 122])
def test_a_disk_that_fills_up_between_two_parts_is_named(tmp_path, errno):
    def parts():
        yield b"1"
        raise OSError(errno, os.strerror(errno))

    with pytest.raises(ResourceError, match=r"c/two: the disk is full"):
        LocalStorage(tmp_path).put_parts("c/two", parts())


def test_parts_become_one_new_file(storage):
    storage.put_parts("c/0/0", (bytes([n]) * n for n in range(5)))
    assert storage.read("c/0/0") == b"\x01\x02\x02\x03\x03\x03\x04\x04\x04\x04"
    with pytest.raises(FileExistsError):
        storage.put_parts("c/0/0", [b"other"])


def test_a_block_is_left_once_all_below_a_folder_is_synced(tmp_path, monkeypatch):
    storage, synced = LocalStorage(tmp_path), set()
    for key in ("c/one", "c/d/two", "e/other"):
        storage.put_parts(key, [b"1"])
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink())))
    with storage.syncing("c"):
        pass
    assert synced == {str(tmp_path / key) for key in ("", "c", "c/one", "c/d", "c/d/two")}


def test_what_cannot_be_synced_is_an_error_of_the_block(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(5, os.strerror(5))

    storage = LocalStorage(tmp_path)
    storage.put_parts("c/one", [b"1"])
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"), storage.syncing("c"):
        pass


def test_stamps_are_those_of_the_list_and_tell_a_replaced_file(storage):
    for key in ("c/b/1", "c/a/1", "d"):
        storage.put_new(key, b"first")
    before = storage.stamps("c")
    assert list(before) == list(storage.list("c")) == ["c/a/1", "c/b/1"]
    storage.put("c/b/1", b"later")  # of the same size
    after = storage.stamps("c")
    assert after["c/a/1"] == before["c/a/1"] and after["c/b/1"] != before["c/b/1"]


def test_folders_are_those_directly_below(storage):
    for key in ("v/a/1", "v/b/c/2", "v/file", "w/1"):
        storage.put_new(key, b"")
    assert storage.folders("v") == ["a", "b"] and storage.folders("none") == []
    assert [storage.exists(key) for key in ("v", "v/b", "v/b/c/2", "v/b/c/3", "", "none")] == [True] * 3 + [
        False,
        True,
        False,
    ]


def test_several_files_come_in_the_order_of_their_keys(storage):
    keys = [f"f/{number:03}" for number in range(70)]
    for key in keys:
        storage.put_new(key, key.encode() * 100)
    assert list(storage.read_each(keys[::-1])) == [key.encode() * 100 for key in keys[::-1]]
    assert list(storage.read_each([])) == []


def test_last_change_is_that_of_the_newest_file_below_and_of_what_was_removed(storage):
    began = time.time() - 2  # a server's clock tells whole seconds
    storage.put_new("c/aa/one/1", b"1")
    assert began <= storage.last_change("c/aa/one/1") <= storage.last_change("c") <= time.time() + 2
    storage.remove("c/aa/one")
    assert storage.last_change("c/aa") >= began
    with pytest.raises(StoreError, match="none"):
        storage.last_change("none")


def test_a_place_is_asked_whether_it_can_be_written_and_keeps_nothing_of_it(storage):
    storage.require_writable("--out")
    assert list(storage.list("")) == [] and list(storage.temporaries()) == []


def test_delete_and_remove(storage):
    storage.put_new("v/a/1", b"")
    storage.put_new("v/a/2", b"")
    storage.remove("v/a/1")
    storage.remove("v/a/1")
    assert list(storage.list("v")) == ["v/a/2"]
    storage.remove("v/a")
    assert not storage.exists("v/a") and list(storage.list("v")) == []


def test_a_further_name_leads_to_the_same_bytes_and_outlives_the_first(storage):
    data = bytes(range(256)) * 40_000  # more than is copied at once
    storage.put_parts("one/c/0", [data])
    storage.link("one/c/0", "two/c/0")
    with pytest.raises(FileExistsError):
        storage.link("one/c/0", "two/c/0")
    storage.remove("one")
    assert storage.read("two/c/0") == data and list(storage.list("")) == ["two/c/0"]
    with pytest.raises(StoreError):
        storage.link("one/c/0", "three")
