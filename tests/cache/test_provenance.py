"""What a run notes of its stores, and how it tells what became of them."""

from __future__ import annotations

import pytest
from support.stores import add_volume, make_store, synthetic_hu

from maesil.cache.provenance import notes_on_spacing, record_uses, recorded_uses, use_of, what_changed
from maesil.errors import DamagedError
from maesil.store.recipe import Recipe
from maesil.store.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    return make_store(tmp_path / "s", [(9, 9, 9), (10, 9, 9)], superpatch=8)


def test_what_is_noted_comes_back(store, tmp_path):
    uses = [use_of(store, 0.5), use_of(make_store(tmp_path / "t", []), None)]
    record_uses(tmp_path, uses)
    assert [vars(use) | {"volumes": None} for use in recorded_uses(tmp_path)] == [
        vars(use) | {"volumes": None} for use in uses
    ]
    assert what_changed(recorded_uses(tmp_path), uses) == ""
    for junk in ("", "[]", '{"stores": [{}]}'):
        (tmp_path / "stores.json").write_text(junk)
        with pytest.raises(DamagedError, match="found it damaged"):
            recorded_uses(tmp_path)
    (tmp_path / "stores.json").unlink()
    assert recorded_uses(tmp_path) == ()


CHANGES = {
    "1 volume added": lambda s: add_volume(s, synthetic_hu((9, 9, 9), 5), name="new"),
    "1 volume removed": lambda s: s.forget(s.volumes()[0].volume_id),
    "1 volume rebuilt from a changed source": lambda s: add_volume(s, synthetic_hu((9, 9, 9), 5), name="volume-0"),
    "another recipe (superpatch_voxels), 2 volumes removed": lambda s: Store.create(
        s.path, Recipe(spacing=None, superpatch=16), "0" * 16, update=True
    ),
}


def test_another_spacing_than_a_run_was_trained_at_is_said(tmp_path):
    native = make_store(tmp_path / "native", [(9, 9, 9)], superpatch=8)
    coarse = Store.create(tmp_path / "coarse", Recipe(spacing=(3.0, 2.0, 2.0), superpatch=8), "0" * 16)
    run = tmp_path / "run"
    assert notes_on_spacing(run, native) == ()  # nothing was noted
    record_uses(run, [use_of(coarse, None)])
    assert notes_on_spacing(run, coarse) == ()
    (note,) = notes_on_spacing(run, native)
    assert note.startswith(f"{run} was trained on voxels of 3 x 2 x 2 mm, {native.path} holds voxels of native spacing")
    assert "expect worse results" in note


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_said(store, change):
    before = use_of(store, None)
    CHANGES[change](store)
    now = use_of(Store.open(store.path), None)
    assert before.fingerprint != now.fingerprint
    assert what_changed([before], [now]) == f"{store.path}: {change}"


def test_another_store_and_a_missing_one_are_said_and_a_moved_one_is_not(store, tmp_path):
    other = use_of(make_store(tmp_path / "t", [(9, 9, 9)], superpatch=8, seed=9), None)
    one = use_of(store, None)
    assert what_changed([one], [one, other]) == f"{other.path} was not among its stores"
    assert what_changed([one, other], [one]) == f"{other.path} is missing"
    moved = use_of(Store.open(store.path.rename(tmp_path / "moved")), None)
    assert what_changed([one], [moved]) == ""
