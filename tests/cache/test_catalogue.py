"""The catalogue as such: names, pins, pruning. What ingest makes of it is in tests/test_build.py."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from support.stores import make_store

from maesil.cache.catalogue import RUN_STORES, Built, Catalogue, entry_of, find_store, state_of_commits
from maesil.errors import StoreError, UsageError
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.urls import local_path

RECIPE = Recipe(spacing=(1.5, 1.5, 1.5))


@pytest.fixture
def catalogue(tmp_path) -> Catalogue:
    return Catalogue(tmp_path / "cache")


def add(catalogue: Catalogue, key: str, name: str | None = None, source: str = "LIDC", size: int = 0):
    entry = catalogue.begin(key, name, [Path("/data") / source], RECIPE)
    make_store(entry.store, [(9, 9, 9)], superpatch=8)
    (entry.folder / "padding").write_bytes(bytes(size))
    store = Store.open(entry.store)
    built = Built("l", state_of_commits(store), 1, 8, 1, 0, store.fingerprint)
    return catalogue.save(type(entry)(**{**vars(entry), "built": built}))


def run_folder(tmp_path: Path, entry, name: str = "run") -> Path:
    run = tmp_path / name
    run.mkdir()
    (run / RUN_STORES).write_text(json.dumps({"stores": [{"path": str(entry.store)}]}))
    return run


def test_names_come_from_source_and_spacing_and_stay_apart(catalogue):
    assert add(catalogue, "a" * 16).name == "LIDC-1.5mm"
    assert add(catalogue, "b" * 16).name == "LIDC-1.5mm-bbbbbb"
    assert add(catalogue, "c" * 16, source="ct of Mr. X.nii.gz").name == "ct-of-Mr.-X-1.5mm"
    native = catalogue.begin("d" * 16, None, [Path("/data/a"), Path("/data/b")], Recipe(spacing=None))
    assert native.name == "a+1-native"
    assert catalogue.begin("e" * 16, None, [Path("/")], Recipe(spacing=(3, 1, 1))).name == "store-3x1mm"


def test_a_name_is_given_changed_and_refused(catalogue):
    add(catalogue, "a" * 16, "mine")
    assert catalogue.begin("a" * 16, None, [Path("x")], RECIPE).name == "mine"
    assert catalogue.begin("a" * 16, "other", [Path("x")], RECIPE).name == "other"
    for bad in ("a/b", "-x", "x=0.5", "x" * 100, "..", "a b"):
        with pytest.raises(UsageError, match="--name"):
            catalogue.begin("b" * 16, bad, [Path("x")], RECIPE)
    with pytest.raises(UsageError, match="other is the store of /data/LIDC"):
        catalogue.begin("c" * 16, "other", [Path("x")], RECIPE)


def test_paths_of_sources_are_for_the_owner_alone(catalogue):
    add(catalogue, "a" * 16)
    assert stat.S_IMODE(catalogue.root.stat().st_mode) == 0o700


def test_stores_are_found_by_path_by_url_and_by_name(catalogue, tmp_path, monkeypatch):
    entry = add(catalogue, "a" * 16, "mine")
    for text in ("mine", str(entry.store), f"file://{entry.store}", f"file://localhost{entry.store}"):
        assert find_store(text, catalogue) == entry.store
    monkeypatch.chdir(tmp_path)
    assert find_store("./mine", catalogue) == Path("mine")
    Path("mine").mkdir()
    assert find_store("mine", catalogue) == entry.store  # a folder that is no store does not hide it
    make_store(Path("mine"), [])
    assert find_store("mine", catalogue) == Path("mine")
    with pytest.raises(StoreError, match=r"nothing: expected a store .* found neither"):
        find_store("nothing", catalogue)


def test_an_unfinished_store_is_not_found(catalogue):
    entry = catalogue.begin("a" * 16, "mine", [Path("x")], RECIPE)
    with pytest.raises(StoreError, match="mine: the store is unfinished"):
        find_store("mine", catalogue)
    with catalogue.building(entry.key, pytest.fail), pytest.raises(StoreError, match=r"being built by process \d+"):
        find_store("mine", catalogue)


@pytest.mark.parametrize("url", ["s3://bucket/x", "https://host/x", "gs://b", "FILE://host/x", "memory://x"])
def test_other_urls_are_refused_in_one_line(url):
    with pytest.raises(UsageError, match="expected a path or file:///PATH") as caught:
        local_path(url)
    assert "\n" not in str(caught.value) and url in str(caught.value)


def test_urls_and_odd_paths_are_told_apart():
    assert local_path("file:///a%20b/c") == Path("/a b/c")
    assert local_path("a:b/c") == Path("a:b/c")
    assert local_path(Path("/x")) == Path("/x")


def test_a_pinned_store_stays_until_its_run_is_gone_or_uses_another(catalogue, tmp_path):
    entry = add(catalogue, "a" * 16)
    run = run_folder(tmp_path, entry)
    entry.pin(run, "f")
    entry.pin(run, "f")
    assert [pin.run for pin in entry.pins()] == [str(run)]
    with pytest.raises(UsageError, match=rf"used by {run}; .*--force"):
        catalogue.remove(entry)
    (run / RUN_STORES).write_text(json.dumps({"stores": [{"path": "/another"}]}))
    assert entry.pins() == []
    catalogue.remove(entry)
    assert catalogue.entries() == [] and not entry.folder.exists()


@pytest.mark.parametrize("junk", ["", "[]", "{}", '{"stores": 1}', '{"stores": ["x"]}'])
def test_a_run_folder_of_something_else_pins_nothing(catalogue, tmp_path, junk):
    entry = add(catalogue, "a" * 16)
    run = run_folder(tmp_path, entry)
    entry.pin(run, "f")
    (run / RUN_STORES).write_text(junk)
    assert entry.pins() == []


def test_pruning_takes_what_was_not_used_longest_and_leaves_what_is_pinned(catalogue, tmp_path):
    entries = [add(catalogue, digit * 16, f"store-{digit}", size=100_000) for digit in "abc"]
    for age, entry in zip((30, 20, 10), entries, strict=True):
        entry.touch()
        os.utime(entry.folder / "used", (1e9 - age, 1e9 - age))
    entries[0].pin(run_folder(tmp_path, entries[0]), "f")
    total = sum(entry.bytes for entry in entries)
    assert list(catalogue.prune(total)) == []
    planned = [(entry, size, why) for entry, size, why in catalogue.prune(total - 1, dry_run=True)]
    assert sum(entry.bytes for entry in catalogue.entries()) == total, "a dry run removes nothing"
    pruned = list(catalogue.prune(total - 1))
    assert pruned == planned, "what was said is what was done"
    assert [(entry.name, bool(why)) for entry, _, why in pruned] == [("store-a", True), ("store-b", False)]
    assert "used by" in pruned[0][2]
    assert [entry.name for entry in catalogue.entries()] == ["store-a", "store-c"]
    assert [why for *_, why in catalogue.prune(0, force=True)] == ["", ""]
    assert catalogue.entries() == [] and not list((catalogue.root / "stores").iterdir())
    assert not (catalogue.root / "removed").exists()


def test_a_store_that_is_being_built_is_not_removed(catalogue):
    entry = add(catalogue, "a" * 16)
    with catalogue.building(entry.key, pytest.fail), pytest.raises(UsageError, match="being built"):
        catalogue.remove(entry, force=True)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"built": {}}', "[" * 100_000], ids=lambda text: text[:9])
def test_a_damaged_entry_is_no_entry(catalogue, damage):
    entry = add(catalogue, "a" * 16)
    (entry.folder / "entry.json").write_text(damage)
    assert catalogue.entries() == [] and catalogue.get(entry.key) is None
    assert catalogue.unreadable() == [entry.folder]


def test_a_file_is_no_cache(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UsageError, match="cache: expected a folder"):
        Catalogue(tmp_path / "cache")


def test_a_store_knows_its_entry(catalogue, tmp_path):
    entry = add(catalogue, "a" * 16)
    assert entry_of(entry.store) == entry
    assert entry_of(make_store(tmp_path / "store.zarr", []).path) is None
