"""Patients that an encoder was trained on are never scored unless asked for; a scan under two names is one patient."""

from __future__ import annotations

import pytest
from support.stores import add_volume, make_store, synthetic_hu

from maesil.downstream import folds
from maesil.downstream.folds import longest_axis
from maesil.errors import UsageError
from maesil.store.index import patients


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Patients a to d; the scan of a is there once more, as patient z, and b has two scans."""
    store = make_store(tmp_path_factory.mktemp("folds") / "s", [])
    for seed, name in enumerate("abcd"):
        add_volume(store, synthetic_hu((40, 44 + 4 * seed, 40), seed), name=name, group=name)
    add_volume(store, synthetic_hu((40, 44, 40), 0), name="z", group="z")
    add_volume(store, synthetic_hu((64, 30, 40), 9), name="b2", group="b")
    return store, {v.group + ("2" if v.shape[0] == 64 else ""): v for v in store.volumes()}


def names(patients, volumes):
    of = {volume.volume_id: name for name, volume in volumes.items()}
    return {frozenset(of[v] for v in patient) for patient in patients}


def patients_of(store, volumes, trained_on, seed, *, include_trained):
    return folds.patients_of(patients([store]), volumes, trained_on, seed, include_trained=include_trained)


def test_nobody_who_was_trained_on_is_scored_under_any_name(world):
    store, volumes = world
    found = patients_of(store, list(volumes.values()), {"z"}, 0, include_trained=False)
    assert names(found.seen, volumes) == {frozenset("az")}
    assert names(found.unseen, volumes) == {frozenset({"b", "b2"}), frozenset("c"), frozenset("d")}
    # Where the scan that was trained on has no label itself, its twin is known by it all the same.
    labelled = [volume for name, volume in volumes.items() if name != "z"]
    assert names(patients_of(store, labelled, {"z"}, 0, include_trained=False).seen, volumes) == {frozenset("a")}


def test_asked_for_they_are_scored_too_and_without_anybody_left_it_is_refused(world):
    store, volumes = world
    everyone = list(volumes.values())
    assert not patients_of(store, everyone, {"z"}, 0, include_trained=True).seen
    with pytest.raises(UsageError, match=r"1 labelled patient, and there is no other.*--include-trained"):
        patients_of(store, [volumes["a"]], {"z"}, 0, include_trained=False)


def test_the_order_follows_from_the_seed_alone(world):
    store, volumes = world
    one, again = (
        patients_of(store, list(volumes.values())[::step], set(), 3, include_trained=False) for step in (1, -1)
    )
    assert names(one.unseen[:2], volumes) == names(again.unseen[:2], volumes)
    orders = {
        patients_of(store, list(volumes.values()), set(), seed, include_trained=False).unseen for seed in range(9)
    }
    assert len(orders) > 1


def test_the_longest_axis_has_the_most_crops():
    assert [longest_axis(shape, 32) for shape in ((64, 32, 65), (33, 32, 32), (10, 64, 64))] == [2, 0, 1]
    with pytest.raises(UsageError, match="two labelled patients"):
        longest_axis((32, 32, 30), 32)
