"""The table of volumes is what the commits say, whoever writes, is killed or damages it; few requests read it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lanes import slow_but
from support.many_volumes import fake_store, fake_volume

from maesil.store import store as store_module
from maesil.store import table as table_module
from maesil.store.backends import open_storage
from maesil.store.garbage import find_garbage, remove_garbage
from maesil.store.store import Store
from maesil.store.table import StaleTableError
from maesil.store.verify import table_problems

COUNT = 7


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A table from one volume on, and segments of three, so that few volumes do what many do."""
    monkeypatch.setattr(store_module, "TABLE_FROM", 1)
    monkeypatch.setattr(table_module, "SMALL", 3)


@pytest.fixture(params=["disk", "objects"])
def place(request, tmp_path):
    """A folder of this machine, and a folder in a bucket of a real server."""
    where = tmp_path / "s.zarr"
    return str(where) if request.param == "disk" else f"s3://{request.getfixturevalue('bucket')}/some/store.zarr"


@pytest.fixture
def store(place) -> Store:
    made = fake_store(place, COUNT)
    made.keep_table()
    return made


def said_by_commits(store: Store) -> list:
    return Store(store.storage, {"recipe_hash": store.recipe_hash, "key_fingerprint": "", "version": 2}).volumes()


def check(store: Store) -> Store:
    """A store opened anew says what its commits say, from its table."""
    opened = Store.open(store.path)
    assert opened.version == 3
    assert list(opened.table.volumes().values()) is not None
    assert opened.volumes() == said_by_commits(store)
    assert opened.fingerprint == Store(store.storage, {**vars(store), "version": 2}).fingerprint
    return opened


def table_keys(store: Store, folder: str) -> list[str]:
    return list(store.storage.list(f"table/{folder}"))


def flip(store: Store, key: str) -> None:
    data = bytearray(store.storage.read(key))
    data[len(data) // 2] ^= 1
    store.storage.put(key, bytes(data))


def test_a_volume_of_the_table_is_that_of_its_commit_in_every_field(store):
    for volume, true in zip(Store.open(store.path).volumes(), said_by_commits(store), strict=True):
        assert volume.count == true.count
        for name in ("iz", "iy", "ix", "offset", "length", "crc32c", "valid", "body", "air"):
            np.testing.assert_array_equal(volume.column(name), true.column(name))
        assert "superpatches" not in vars(volume), "numbers of superpatches need no object of each"
        for one in fields(true):
            assert getattr(volume, one.name) == getattr(true, one.name)
        assert volume == true and volume.to_json() == true.to_json() and repr(volume) == repr(true)
        assert replace(volume, generation=9).to_json() == replace(true, generation=9).to_json()
    for volume, true in zip(Store.open(store.path).volumes(), said_by_commits(store), strict=True):
        assert pickle.loads(pickle.dumps(volume)) == true
        with pytest.raises(AttributeError, match="colour"):
            _ = volume.colour


def test_a_small_store_has_no_table_and_stays_of_its_version(place, monkeypatch):
    monkeypatch.setattr(store_module, "TABLE_FROM", COUNT + 1)
    store = fake_store(place, COUNT)
    store.keep_table()
    assert Store.open(place).version == 2 and not list(store.storage.list("table"))
    store.commit(fake_volume(COUNT, store.recipe_hash, 1))
    store.keep_table()
    assert len(check(store).volumes()) == COUNT + 1


@settings(max_examples=12)
@given(st.lists(st.tuples(st.sampled_from("acrfsw"), st.integers(0, 5)), max_size=20))
def test_after_any_steps_the_table_is_what_the_commits_say(tmp_path_factory, steps):
    store = fake_store(tmp_path_factory.mktemp("any") / "s.zarr", 2)
    store.keep_table()
    writers = [store, Store.open(store.path)]
    for number, (step, which) in enumerate(steps):
        writer = writers[number % 2]
        if step in "ac":
            writer.commit(fake_volume(which, store.recipe_hash, which, state=number if step == "c" else 0))
        elif step == "r":
            writer.forget(fake_volume(which, "").volume_id)
        elif step == "f":  # the group alone
            live = writer.live(fake_volume(which, "").volume_id)
            if live is not None:
                writer.commit(replace(live, group=f"{number:032d}"), anew=True)
        else:
            writer.keep_table(whole=step == "w")
        assert writers[1].volumes() == said_by_commits(store)
    check(store)
    assert not list(table_problems(store))


ENDS = ("before the mark", "after the mark", "after the commit", "before it is published", "before marks go")


@pytest.mark.parametrize("ends", slow_but(ENDS, ("after the commit", "before it is published")))
def test_a_writer_that_is_killed_loses_no_volume(store, monkeypatch, ends):
    new = fake_volume(COUNT, store.recipe_hash, 3)
    puts = store.storage.put_new

    def stop(*_: object, **__: object):
        raise KeyboardInterrupt

    def killed_put(key, data):
        if key.startswith("commits/") and ends == "after the mark":
            stop()
        if key.startswith("table/manifests/") and ends == "before it is published":
            stop()
        return puts(key, data)

    with monkeypatch.context() as patch:
        patch.setattr(store.storage, "put_new", killed_put)
        if ends == "before the mark":
            patch.setattr(store.table, "mark", stop)
        if ends == "after the commit":
            patch.setattr(store_module.Store, "keep_table", stop)
            patch.setattr(store_module, "_SETTLE_EVERY", 1)
        if ends == "before marks go":
            patch.setattr(store.table, "_clear", stop)
        with pytest.raises(KeyboardInterrupt):
            store.commit(new)
            store.keep_table(whole=False)
    there = ends not in ("before the mark", "after the mark")
    assert (new in check(store).volumes()) == there
    again = Store.open(store.path)
    again.commit(new)
    again.keep_table()
    assert new in check(store).volumes() and not table_keys(store, "pending")


def test_a_mark_whose_commit_never_came_is_kept_for_a_day(store, monkeypatch):
    store.table.mark("ab" * 16, 1)
    store.keep_table()
    assert len(table_keys(store, "pending")) == 1 and len(check(store).volumes()) == COUNT
    monkeypatch.setattr(table_module, "FORGET_AFTER_SECONDS", -1.0)
    store.keep_table()
    assert not table_keys(store, "pending")


def test_a_commit_that_comes_after_its_mark_was_looked_at_is_not_lost(store):
    """The mark of a slow writer outlasts the table that was made meanwhile."""
    new = fake_volume(COUNT, store.recipe_hash, 1)
    store.table.mark(new.volume_id, 1)
    Store.open(store.path).keep_table()
    assert store.storage.put_new(new.key, new.to_json())
    assert new in check(store).volumes()
    Store.open(store.path).keep_table(whole=False)
    assert new in check(store).volumes() and not table_keys(store, "pending")


def test_a_writer_from_before_there_was_a_table_marks_what_it_commits(place):
    early = fake_store(place, COUNT)
    assert early.version == 2
    other = Store.open(place)
    other.keep_table()
    early.commit(fake_volume(COUNT, early.recipe_hash, 1))
    early.forget(fake_volume(0, "").volume_id)
    assert len(check(early).volumes()) == COUNT


def test_a_manifest_of_an_old_number_counts_for_nothing(store):
    for number in range(COUNT, COUNT + 4):
        store.commit(fake_volume(number, store.recipe_hash, 1))
        store.keep_table()
    number = int(table_keys(store, "manifests")[-1][-13:-5])
    assert number >= 4 and len(table_keys(store, "manifests")) <= 2
    assert not store.table._publish(1, store.table._manifest(number)), "a sleeper woke up"
    check(store)


@pytest.mark.parametrize("place", slow_but(("disk", "objects"), ("disk",)), indirect=True)
def test_eight_writers_at_once_lose_nothing(place):
    store = fake_store(place, 3)
    store.keep_table()
    barrier = threading.Barrier(8)

    def write(writer: int) -> None:
        own = Store.open(place)
        barrier.wait()
        for number in range(2):
            own.commit(fake_volume(100 + writer + 2 * number, own.recipe_hash, 2, state=writer))
            own.keep_table(whole=number == 1)
        own.forget(fake_volume(writer % 3, "").volume_id)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(check(store).volumes()) == 10
    store.keep_table()
    check(store)
    assert not list(table_problems(Store.open(place)))


@pytest.mark.parametrize("what", ["segments", "manifests"])
@pytest.mark.parametrize("how", slow_but(("flipped", "missing", "empty"), ("flipped",)))
def test_damage_is_said_in_one_line_and_the_commits_are_read(store, what, how, caplog):
    key = table_keys(store, what)[-1]
    if how == "flipped":
        flip(store, key)
    elif how == "missing":
        store.storage.remove(key)
    else:
        store.storage.put(key, b"")
    opened = Store.open(store.path)
    assert opened.volumes() == said_by_commits(store) == opened.volumes()
    (line,) = caplog.messages
    assert (
        line.startswith(f"{store.path}: the table of volumes is ") and "maesil store index" in line and "\n" not in line
    )
    assert [problem for problem in table_problems(Store.open(store.path)) if "table of volumes" in problem]
    caplog.clear()
    Store.open(store.path).keep_table()
    check(store)
    assert not caplog.messages and not list(table_problems(Store.open(store.path)))


def test_a_table_that_lies_is_found_by_verify_and_mended(store):
    volume = said_by_commits(store)[0]
    changed = replace(volume, group="f" * 32)
    store.storage.put(volume.key, changed.to_json())  # as nobody may
    assert [problem for problem in table_problems(Store.open(store.path)) if volume.volume_id in problem]


def test_commits_removed_by_hand_are_noticed_on_a_disk(tmp_path):
    import shutil

    store = fake_store(tmp_path / "s", COUNT)
    store.keep_table()
    gone = said_by_commits(store)[2]
    shutil.rmtree(tmp_path / "s" / Path(gone.key).parent)
    assert gone not in check(store).volumes()
    (tmp_path / "s/commits/ab" / ("ab" * 16)).mkdir(parents=True)  # of a writer that got no further
    assert len(check(store).volumes()) == COUNT - 1


@pytest.mark.parametrize("place", slow_but(("disk", "objects"), ("disk",)), indirect=True)
def test_adding_a_volume_rewrites_a_small_segment_alone(place, monkeypatch):
    monkeypatch.setattr(table_module, "SMALL", 4)
    store = fake_store(place, 60)
    store.keep_table()
    rewritten = []
    for number in range(60, 74):
        before = {part.name: part.rows for part in store.table._manifest(store.table._list().number)}
        store.commit(fake_volume(number, store.recipe_hash, 1))
        store.keep_table(whole=False)
        after = {part.name: part.rows for part in store.table._manifest(store.table._list().number)}
        rewritten.append(sum(rows for name, rows in before.items() if name not in after))
        assert len(after) <= 8
    assert max(rewritten) < 60 and np.median(rewritten) < 4
    assert len(table_keys(store, "segments")) <= 16, "what no table needs goes"
    check(store)


def test_what_killed_writers_left_of_the_table_is_garbage(tmp_path):
    store = fake_store(tmp_path / "s", COUNT)
    store.keep_table()
    stray = store.table._write(table_module.Segment.of([fake_volume(0, store.recipe_hash, 1)]))
    assert not find_garbage(store)
    long_ago = time.time() - 48 * 3600
    for path in (tmp_path / "s/table").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    (found,) = find_garbage(store)
    assert found.key == stray.key
    remove_garbage(store, found)
    check(store)


def test_few_requests_open_a_store_in_a_bucket(proxy, bucket):
    store = fake_store(f"s3://{bucket}/store.zarr", 60)
    store.keep_table()
    store.commit(fake_volume(60, store.recipe_hash, 2))
    before = len(proxy.requests)
    opened = Store.open(store.path)
    assert len(opened.volumes()) == 61
    assert len(proxy.requests) - before < 10
    assert len(proxy.of("GET", "commits/")[-1:]) == 1, "that of the mark"


@pytest.mark.parametrize(
    "fault", slow_but(("slow down", "internal error", "lost answer", "cut body"), ("lost answer", "cut body"))
)
def test_a_bad_network_changes_nothing(proxy, bucket, fault):
    asked = iter(range(10**6))
    store = fake_store(f"s3://{bucket}/store.zarr", 5)
    proxy.faults = lambda request: fault if next(asked) % 3 == 0 else None
    store.keep_table()
    for number in range(5, 8):
        store.commit(fake_volume(number, store.recipe_hash, 1))
    store.forget(fake_volume(0, "").volume_id)
    store.keep_table(whole=False)
    assert len(check(store).volumes()) == 7


_KILLED = """
import sys
from support.many_volumes import fake_volume
from maesil.store import store as module, table
from maesil.store.store import Store
module._SETTLE_EVERY, table.SMALL = 2, 3
store = Store.open(sys.argv[1])
print("ready", flush=True)
for number in range(1000, 2000):
    store.commit(fake_volume(number, store.recipe_hash, 1))
    if number % 5 == 0:
        store.forget(fake_volume(number - 3, "").volume_id)
"""


@pytest.mark.slow
def test_writers_killed_at_any_moment_leave_a_table_that_is_true(tmp_path):
    store = fake_store(tmp_path / "s", COUNT)
    store.keep_table()
    for wait in (0.03, 0.11, 0.2, 0.29, 0.4, 0.55):
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(store.path)],
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(wait)
        process.kill()
        process.wait()
        process.stdout.close()
        check(store)
    assert len(said_by_commits(store)) > COUNT
    store.keep_table()
    check(store)


def test_a_store_without_a_table_that_should_have_one_is_read(tmp_path, caplog):
    store = fake_store(tmp_path / "s", COUNT)
    store.keep_table()
    for key in list(open_storage(store.path).list("table")):
        store.storage.remove(key)
    opened = Store.open(store.path)
    with pytest.raises(StaleTableError):
        opened.table.volumes()
    assert len(opened.volumes()) == COUNT and "missing" in caplog.text
