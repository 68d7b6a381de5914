from __future__ import annotations

import os
import time

import pytest
from support.stores import add_volume, make_store, synthetic_hu
from typer.testing import CliRunner

from maesil.cli import app
from maesil.errors import StoreError
from maesil.store.garbage import find_garbage, remove_garbage
from maesil.store.store import Store
from maesil.store.verify import verify

HOURS = 3600


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "s", [(20, 24, 16), (16, 16, 16)], superpatch=16)
    return Store.open(tmp_path / "s")


def files(store):
    return {path.relative_to(store.path).as_posix() for path in store.path.rglob("*") if path.is_file()}


def age(store, hours, prefix="."):
    then = time.time() - hours * HOURS
    for path in [store.path / prefix, *(store.path / prefix).rglob("*")]:
        os.utime(path, (then, then))


def replaced(store, name="again"):
    """Commit a volume twice, with other voxels; return both commits."""
    return [add_volume(store, synthetic_hu((16, 24, 16), seed), name=name) for seed in (1, 2)]


def test_an_intact_store_of_any_age_has_nothing_to_remove(store):
    before = files(store)
    age(store, 1000)
    assert find_garbage(store) == []
    assert files(store) == before


def test_a_replaced_attempt_goes_a_day_after_it_was_replaced_and_the_volume_stays(store):
    old, new = replaced(store)
    assert find_garbage(store) == []
    age(store, 48, old.prefix)
    assert find_garbage(store) == [], "it was replaced just now: a run may be reading it"
    age(store, 48)
    (garbage,) = find_garbage(store)
    assert (garbage.key, garbage.records) == (old.prefix, (old.key,))
    assert garbage.bytes == sum(path.stat().st_size for path in (store.path / old.prefix).rglob("*") if path.is_file())
    kept = {name for name in files(store) if not name.startswith(old.prefix) and name != old.key}
    remove_garbage(store, garbage)
    assert files(store) == kept
    assert store.live(new.volume_id) == new
    assert find_garbage(store) == [] and verify(store).problems == ()


def test_an_attempt_that_was_never_committed_goes_once_nothing_writes_it(store):
    volume = store.volumes()[0]
    torn = store.path / volume.prefix.replace(volume.attempt, "f" * 32) / "0/c/0/0"
    torn.mkdir(parents=True)
    (torn / "0").write_bytes(b"half a shard")
    age(store, 48)
    os.utime(torn / "0")
    assert find_garbage(store) == [], "another process is writing it"
    age(store, 25)
    (garbage,) = find_garbage(store)
    assert garbage.bytes == 12 and garbage.records == ()
    assert find_garbage(store, older_than_hours=26) == []
    remove_garbage(store, garbage)
    assert find_garbage(store) == [] and verify(store).problems == ()


def test_what_a_killed_process_was_writing_goes(store):
    (store.path / "index/.tmp-1234").write_bytes(b"x" * 100)
    age(store, 25)
    (garbage,) = find_garbage(store)
    assert (garbage.key, garbage.bytes) == ("index/.tmp-1234", 100)
    remove_garbage(store, garbage)
    assert not (store.path / "index/.tmp-1234").exists()


def test_a_volume_taken_out_of_the_store_leaves_its_attempt_for_a_day(store):
    volume = store.volumes()[0]
    age(store, 48)
    store.forget(volume.volume_id)
    assert find_garbage(store) == []
    age(store, 48)
    assert [garbage.key for garbage in find_garbage(store)] == [volume.prefix]


def test_with_a_damaged_commit_nothing_is_removed(store):
    replaced(store)
    key = store.live_commits()[0]
    (store.path / key).write_bytes(b"{}")
    age(store, 48)
    with pytest.raises(StoreError):
        find_garbage(store)


def test_the_command_says_what_goes_and_a_dry_run_removes_nothing(store):
    old, _ = replaced(store)
    before = files(store)
    said = CliRunner().invoke(app, ["store", "gc", str(store.path), "--dry-run", "--older-than", "0"])
    assert said.exit_code == 0 and old.prefix in said.output and "1 piece," in said.output
    assert files(store) == before
    said = CliRunner().invoke(app, ["store", "gc", str(store.path), "--older-than", "0"])
    assert said.exit_code == 0 and "freed" in said.output
    assert not (store.path / old.prefix).exists()
