"""Superpatches staged on a disk: fetched once by however many, kept in bounds, and never taken for whole when cut."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.stores import make_store

from maesil.cache.ram import ram_readers
from maesil.cache.stage import Stage
from maesil.errors import StoreError, UsageError
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store

EDGE = 16


@pytest.fixture(params=["fast", "raw"])
def store(request, tmp_path):
    return make_store(tmp_path / "s", [(40, 36, 33), (16, 20, 40)], superpatch=EDGE, codec=request.param)


class Counted:
    """A storage's reads, counted: what a stage is to save."""

    def __init__(self, storage):
        self.root, self._storage, self.reads = storage.root, storage, []

    def read_into(self, key, offset, buffer):
        self.reads.append((key, offset))
        self._storage.read_into(key, offset, buffer)


def superpatches(reader):
    return [(volume_id, patch.index) for volume_id, v in reader.volumes.items() for patch in v.superpatches]


def read_all(reader, threads=4):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda place: reader.read_superpatch(*place), superpatches(reader)))


def staged(folder):
    return sorted(path for path in folder.glob("??/*") if not path.name.startswith("."))


def stored(store):
    return sum(patch.length for volume in store.volumes() for patch in volume.superpatches)


def same(found, truth):
    return all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))


def test_each_superpatch_is_read_once_whoever_asks_how_often(store, tmp_path):
    truth, counted = read_all(SuperpatchReader(store)), Counted(store.storage)
    for _ in range(3):  # each time a run of its own
        reader = SuperpatchReader(store, Stage(tmp_path / "stage", 10**9).over(counted))
        assert same(read_all(reader), truth) and same(read_all(reader), truth)
    assert len(counted.reads) == len(set(counted.reads)) == len(superpatches(reader))
    assert (
        Stage(tmp_path / "stage", 10**9).used
        == stored(store)
        == sum(p.stat().st_size for p in staged(tmp_path / "stage"))
    )


def test_with_memory_in_front_the_voxels_are_the_same(store, tmp_path):
    truth, counted = read_all(SuperpatchReader(store)), Counted(store.storage)
    through = Stage(tmp_path / "stage", 10**9).over(counted)
    (reader,) = ram_readers([store], stored(store) // 2, [through])
    assert same(read_all(reader), truth) and same(read_all(reader), truth)
    assert len(counted.reads) == len(truth)


def test_threads_that_want_the_same_superpatch_fetch_it_once(store, tmp_path):
    class Slow(Counted):
        def read_into(self, key, offset, buffer):
            time.sleep(0.05)
            super().read_into(key, offset, buffer)

    counted = Slow(store.storage)
    reader = SuperpatchReader(store, Stage(tmp_path / "stage", 10**9).over(counted))
    place = superpatches(reader)[0]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: reader.read_superpatch(*place), range(16)))
    assert len(counted.reads) == 1


def _read_there(path, stage, counts):
    store = Store.open(path)
    counted = Counted(store.storage)
    read_all(SuperpatchReader(store, Stage(stage, 10**9).over(counted)))
    counts.put(len(counted.reads))


def test_processes_of_a_machine_share_it(store, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maesil.cache.stage", "support.stores"])
    counts = context.SimpleQueue()
    processes = [context.Process(target=_read_there, args=(store.path, tmp_path / "stage", counts)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(counts.get() for _ in processes) == len(superpatches(SuperpatchReader(store)))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer"])
def test_what_is_damaged_on_the_stage_is_fetched_anew(store, tmp_path, damage):
    truth, counted = read_all(SuperpatchReader(store)), Counted(store.storage)
    stage = Stage(tmp_path / "stage", 10**9)
    reader = SuperpatchReader(store, stage.over(counted))
    read_all(reader)
    path = staged(stage.folder)[3]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-7], "empty": b"", "longer": data + b"x"}[damage])
    assert same(read_all(reader), truth)
    assert len(counted.reads) == len(truth) + 1
    assert same(read_all(reader), truth) and len(counted.reads) == len(truth) + 1


def test_what_is_damaged_in_the_store_is_told_and_not_staged(store, tmp_path):
    patch = store.volumes()[0].superpatches[0]
    path = store.path / patch.path
    data = bytearray(path.read_bytes())
    data[patch.offset + 9] ^= 1
    path.write_bytes(data)
    stage = Stage(tmp_path / "stage", 10**9)
    reader = SuperpatchReader(store, stage.over(store.storage))
    with pytest.raises(StoreError, match="checksum mismatch"):
        reader.read_superpatch(store.volumes()[0].volume_id, patch.index)
    assert not staged(stage.folder) and stage.used == 0


def test_those_not_used_for_the_longest_time_go_and_the_size_is_kept(store, tmp_path):
    counted = Counted(store.storage)
    limit = stored(store) // 2
    stage = Stage(tmp_path / "stage", limit)
    reader = SuperpatchReader(store, stage.over(counted))
    places = superpatches(reader)
    for place in places:
        reader.read_superpatch(*place)
        reader.read_superpatch(*places[0])  # in use all the time
        assert sum(path.stat().st_size for path in staged(stage.folder)) <= stage.used <= limit
    assert len(counted.reads) == len(places), "the one in use never went"
    before = len(counted.reads)
    reader.read_superpatch(*places[0])
    reader.read_superpatch(*places[-1])
    assert len(counted.reads) == before, "what was used just now stayed"
    reader.read_superpatch(*places[1])
    assert len(counted.reads) == before + 1, "what was used long ago went"
    assert stage.used > limit / 2


def test_a_smaller_size_takes_hold_at_once_and_one_too_small_for_anything_works(store, tmp_path):
    truth = read_all(SuperpatchReader(store))
    read_all(SuperpatchReader(store, Stage(tmp_path / "stage", 10**9).over(store.storage)))
    stage = Stage(tmp_path / "stage", 100)
    assert stage.used == 0 and not staged(stage.folder)
    assert same(read_all(SuperpatchReader(store, stage.over(store.storage))), truth)
    assert stage.used <= 100


READS_ON = """
import sys
from pathlib import Path
from maesil.cache.stage import Stage
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
store = Store.open(sys.argv[1])
stage = Stage(Path(sys.argv[2]), int(sys.argv[3]))
reader = SuperpatchReader(store, stage.over(store.storage))
print("on", flush=True)
while True:
    for volume_id, volume in reader.volumes.items():
        for patch in volume.superpatches:
            reader.read_superpatch(volume_id, patch.index)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_holds_nothing_half(store, tmp_path):
    truth, limit = read_all(SuperpatchReader(store)), stored(store) // 3
    for milliseconds in (1, 5, 20, 60, 150):
        process = subprocess.Popen(
            [sys.executable, "-c", READS_ON, str(store.path), str(tmp_path / "stage"), str(limit)],
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        stage = Stage(tmp_path / "stage", limit)
        assert sum(path.stat().st_size for path in staged(stage.folder)) == stage.used <= limit
        assert same(read_all(SuperpatchReader(store, stage.over(store.storage))), truth)


def test_what_a_killed_writer_left_goes_after_an_hour(store, tmp_path):
    stage = Stage(tmp_path / "stage", 10**9)
    read_all(SuperpatchReader(store, stage.over(store.storage)))
    left = staged(stage.folder)[0].with_name(".partial-of-a-killed-one")
    left.write_bytes(b"half")
    Stage(tmp_path / "stage", 10**9)
    assert left.exists()
    os.utime(left, (time.time() - 4000,) * 2)
    Stage(tmp_path / "stage", 10**9)
    assert not left.exists()


def test_it_takes_no_folder_of_other_files_and_lets_nobody_else_read(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"--stage: .*expected an empty folder or a stage"):
        Stage(tmp_path / "mine", 10**9)
    with pytest.raises(UsageError, match="expected a folder"):
        Stage(tmp_path / "mine" / "letter.txt", 10**9)
    with pytest.raises(UsageError, match="found one in the store"):
        Stage(Path(store.path) / "stage", 10**9)
    stage = Stage(tmp_path / "stage", 10**9)
    read_all(SuperpatchReader(store, stage.over(store.storage)))
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in staged(stage.folder)} == {0o700}
