"""Stores: what is opened, what is refused, and what several writers leave behind."""

from __future__ import annotations

import json
import threading
import uuid
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import zarr
from support.stores import add_volume, make_store, synthetic_hu

from maesil.documents import canonical_json, unsealed
from maesil.errors import StoreError, UsageError
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.records import Refusal
from maesil.store.store import Store, _root_document

RECIPE = Recipe(spacing=None, superpatch=32)
KEY = "0" * 16


def open_error(path: Path) -> str:
    with pytest.raises(StoreError) as caught:
        Store.open(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def _foreign(path: Path, kind: str) -> None:
    if kind == "missing":
        return
    if kind == "file":
        path.write_bytes(b"x")
        return
    path.mkdir()
    if kind == "zarr array":
        zarr.create_array(path, shape=(4,), dtype="int16")
    elif kind == "zarr group":
        zarr.create_group(path)
    elif kind == "folder of that name":
        (path / "zarr.json").mkdir()
    elif kind != "empty":
        (path / "zarr.json").write_text(kind)


FOREIGN = ["missing", "file", "empty", "zarr array", "zarr group", "folder of that name", "", "null", "[]", "{"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_store_is_said_in_one_line(tmp_path, kind):
    path = tmp_path / "s.zarr"
    _foreign(path, kind)
    assert "expected" in open_error(path)


def test_binary_junk_is_no_store(tmp_path):
    (tmp_path / "zarr.json").write_bytes(bytes(range(256)))
    assert "expected a store" in open_error(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 4}, "version 4"),
        ({"format": "other"}, "found other"),
        ({"recipe_hash": None}, "damaged"),
        ({"key_fingerprint": 7}, "damaged"),
    ],
)
def test_other_versions_and_damaged_roots(tmp_path, change, message):
    Store.create(tmp_path / "s", RECIPE, KEY)
    root = tmp_path / "s/zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["maesil"] |= change
    root.write_text(json.dumps(document))
    assert message in open_error(tmp_path / "s")


def test_create_opens_what_is_there(tmp_path):
    path = tmp_path / "deep" / "s.zarr"
    first, second = Store.create(path, RECIPE, KEY), Store.create(path, RECIPE, KEY)
    assert first.recipe_hash == second.recipe_hash == RECIPE.hash
    assert Store.open(str(path)).recipe == RECIPE
    assert zarr.open_group(path, mode="r").attrs["maesil"]["version"] == 2
    assert isinstance(zarr.open_group(path, mode="r")["volumes"], zarr.Group)


def test_create_goes_on_where_a_killed_one_stopped(tmp_path):
    Store.create(tmp_path / "s", RECIPE, KEY)
    (tmp_path / "s/zarr.json").unlink()
    (tmp_path / "s/volumes/zarr.json").unlink()
    Store.create(tmp_path / "s", RECIPE, KEY)
    assert Store.open(tmp_path / "s").volumes() == []
    assert zarr.open_group(tmp_path / "s", mode="r")["volumes"] is not None


@pytest.mark.parametrize("kind", ["file", "zarr array", "zarr group", "{"])
def test_create_never_takes_over_what_is_not_its_own(tmp_path, kind):
    path = tmp_path / "s"
    _foreign(path, kind)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(UsageError if kind == "file" else StoreError):
        Store.create(path, RECIPE, KEY)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_create_refuses_a_folder_of_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="--out"):
        Store.create(tmp_path, RECIPE, KEY)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_recipe_is_named_and_needs_update(tmp_path):
    Store.create(tmp_path / "s", RECIPE, KEY)
    other = replace(RECIPE, superpatch=64, codec="raw")
    with pytest.raises(UsageError, match=r"superpatch_voxels: 32 -> 64; codec: fast -> raw.*--update"):
        Store.create(tmp_path / "s", other, KEY)
    assert Store.open(tmp_path / "s").recipe == RECIPE
    updated = Store.create(tmp_path / "s", other, KEY, update=True)
    assert updated.recipe_hash == other.hash
    assert Store.open(tmp_path / "s").recipe == other
    assert Store.create(tmp_path / "s", RECIPE, KEY, update=True).recipe == RECIPE


def test_another_key_is_refused_even_with_update(tmp_path):
    Store.create(tmp_path / "s", RECIPE, KEY)
    with pytest.raises(UsageError, match="--key-file"):
        Store.create(tmp_path / "s", RECIPE, "f" * 16, update=True)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"spacing_zyx_mm": 1}', b'"x"', None, "one digit"], ids=repr)
def test_a_damaged_recipe_is_found(tmp_path, damage):
    store = Store.create(tmp_path / "s", RECIPE, KEY)
    path = tmp_path / f"s/recipes/{RECIPE.hash}.json"
    if damage is None:
        path.unlink()
    elif damage == "one digit":
        path.write_bytes(path.read_bytes().replace(b"-1024", b"-1023"))
    else:
        path.write_bytes(damage)
    with pytest.raises(StoreError):
        _ = store.recipe


def test_eight_creators_agree_on_one_recipe(tmp_path):
    recipes = [replace(RECIPE, superpatch=8 * n) for n in range(1, 9)]
    outcomes: list[str] = []

    def create(recipe: Recipe) -> None:
        try:
            outcomes.append(Store.create(tmp_path / "s", recipe, KEY).recipe_hash)
        except UsageError:
            outcomes.append("refused")

    run_at_once([lambda r=recipe: create(r) for recipe in recipes])
    assert sorted(outcomes)[1:] == ["refused"] * 7
    assert Store.open(tmp_path / "s").recipe.hash == sorted(outcomes)[0]


def run_at_once(tasks) -> None:
    barrier = threading.Barrier(len(tasks))

    def run(task) -> None:
        barrier.wait()
        task()

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def store(tmp_path) -> Store:
    return make_store(tmp_path / "s.zarr", [(20, 20, 20)], superpatch=16)


def test_racing_committers_leave_one_commit_a_content(store):
    volume = store.volumes()[0]
    contents = [f"{number:064d}" for number in range(4)]
    results = []

    def commit(source_hash: str) -> None:
        attempt = uuid.uuid4().hex
        record = replace(volume, source_hash=source_hash, attempt=attempt)
        (store.path / record.prefix).mkdir()
        results.append((record, store.commit(record)))

    # Each content twice, eight at once, all of one volume.
    run_at_once([lambda h=h: commit(h) for h in contents for _ in range(2)])
    keys = [key for key in store.storage.list("commits") if volume.volume_id in key]
    records = [store.read_commit(key) for key in keys]
    assert [record.generation for record in records] == list(range(1, len(records) + 1))
    assert {record.source_hash for record in records} == {volume.source_hash, *contents}
    assert all(a.source_hash != b.source_hash for a, b in pairwise(records))
    assert store.live(volume.volume_id) == records[-1] == store.volumes()[0]
    committed = {record.attempt for record in records}
    for wanted, live in results:
        assert live.source_hash == wanted.source_hash
        assert (store.path / wanted.prefix).exists() == (wanted.attempt in committed)


def test_same_content_twice_is_one_commit(store):
    hu = synthetic_hu((20, 20, 20))
    again = add_volume(store, hu, name="volume-0")
    assert again == store.volumes()[0]
    assert len(list(store.storage.list("commits"))) == 1
    attempts = [p for p in (store.path / again.prefix).parent.iterdir() if p.is_dir()]
    assert [p.name for p in attempts] == [again.attempt]


def test_committing_the_live_attempt_again_leaves_it_alone(store):
    volume = store.volumes()[0]
    assert store.commit(volume) == volume
    SuperpatchReader(store).read_superpatch(volume.volume_id, (0, 0, 0))


def test_other_content_is_the_next_generation(store):
    before = store.fingerprint
    hu = synthetic_hu((20, 20, 20), seed=7)
    newer = add_volume(store, hu, name="volume-0")
    assert newer.generation == 2
    assert store.volumes() == [newer]
    assert store.fingerprint != before


def test_generations_count_beyond_ten(store):
    volume = store.volumes()[0]
    for number in range(11):
        store.commit(replace(volume, source_hash=str(number), attempt=uuid.uuid4().hex))
    assert store.volumes()[0].generation == 12


def test_fingerprint_knows_content_not_order_or_place(tmp_path):
    shapes = [(9, 9, 9), (10, 9, 9)]
    a = make_store(tmp_path / "a", shapes, superpatch=16)
    b = Store.create(tmp_path / "b", a.recipe, KEY)
    for number in (1, 0):
        add_volume(b, synthetic_hu(shapes[number], number), name=f"volume-{number}")
    assert a.fingerprint == b.fingerprint
    assert a.fingerprint != make_store(tmp_path / "c", shapes[:1], superpatch=16).fingerprint


def test_stray_files_among_the_commits_are_passed_over(store):
    commit = store.path / store.volumes()[0].key
    for stray in (commit.parent / ".DS_Store", commit.parent / (commit.name + "~"), store.path / "commits/.DS_Store"):
        stray.write_bytes(b"junk")
    assert len(store.volumes()) == 1
    assert store.live(store.volumes()[0].volume_id) == store.volumes()[0]


def test_a_damaged_commit_names_store_and_volume(store):
    path = store.path / store.volumes()[0].key
    volume_id = store.volumes()[0].volume_id
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=volume_id) as caught:
        store.volumes()
    assert str(caught.value).startswith(f"{store.path}: ")


def test_volume_by_the_beginning_of_its_id(tmp_path):
    store = make_store(tmp_path / "s", [(9, 9, 9)] * 3, superpatch=16)
    volume = store.volumes()[1]
    assert store.volume(volume.volume_id[:10]) == volume
    for name in ("", "nothing"):
        with pytest.raises(UsageError, match="store info"):
            store.volume(name)


def test_quarantine_records_come_back_and_go(store):
    whole = Refusal("ab" * 16, "gap", "one missing", {"missing": [1]}, "5" * 64, "", 7)
    by_headers = Refusal("cd" * 16, "localizer", "a scout", files=1)
    for record in (whole, by_headers):
        store.quarantine(record)
    assert store.quarantined() == [whole, by_headers]
    assert unsealed(store.storage.read(f"quarantine/cd/{'cd' * 16}.json")) == {
        "volume_id": "cd" * 16, "code": "localizer", "detail": "a scout", "files": 1
    }  # fmt: skip
    for record in (whole, whole, by_headers):
        store.release(record.volume_id)
    assert store.quarantined() == []


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"\xff"])
def test_a_damaged_refusal_is_said_in_one_line(store, damage):
    store.storage.put("quarantine/ab/abc.json", damage)
    with pytest.raises(StoreError, match="abc"):
        store.quarantined()


def test_records_are_canonical(store):
    for key in (*store.storage.list("commits"), *store.storage.list("recipes"), "zarr.json"):
        data = store.storage.read(key)
        assert canonical_json(json.loads(data)) == data


def test_a_commit_is_read_once_and_anew_when_it_changed(tmp_path, monkeypatch):
    store = Store.open(make_store(tmp_path / "s", [(16, 16, 16), (20, 16, 16)], superpatch=16).path)
    read, original = [], Store._volume
    monkeypatch.setattr(Store, "_volume", lambda self, key, data: (read.append(key), original(self, key, data))[1])
    volumes = store.volumes()
    assert store.volumes() == volumes and store.outdated() == [] and len(read) == 2
    added = add_volume(store, synthetic_hu((16, 16, 16), 7), name="later")
    assert added in store.volumes() and len(read) == 3
    store.forget(volumes[0].volume_id)
    assert volumes[0] not in store.volumes() and len(store.volumes()) == 2
    (store.path / volumes[1].key).write_bytes(b"{}")
    with pytest.raises(StoreError):
        store.volumes()


def test_an_ingest_into_a_store_of_version_1_says_so_in_its_root_first(tmp_path):
    store = Store.create(tmp_path / "s", RECIPE, KEY)
    store.storage.put("zarr.json", _root_document(RECIPE.hash, KEY, 1))
    assert Store.open(tmp_path / "s").version == 1, "opening changes nothing"
    assert Store.create(tmp_path / "s", RECIPE, KEY).version == Store.open(tmp_path / "s").version == 2
