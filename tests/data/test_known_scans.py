"""A run knows its scans again by what it keeps itself: by identity, source, pixels and looks."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.stores import add_volume, make_store, synthetic_hu

from maesil.data.known_scans import EARLIER, SCANS, known_scans, read_scans, record_scans, same_patients
from maesil.data.split import Split


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on two patients of a store, one of whom it is validated on; the store is gone."""
    root = tmp_path_factory.mktemp("scans")
    store = make_store(root / "s", [])
    for seed, name in enumerate("abc"):
        add_volume(store, synthetic_hu((40, 44 + 4 * seed, 40), seed), name=name, group=name)
    run = root / "run"
    run.mkdir()
    record_scans(run, [store], Split(("a",), ("b",)))
    shutil.rmtree(root / "s")
    return run


def test_what_is_kept_are_the_scans_that_were_seen(trained):
    scans = read_scans(trained)
    assert sorted((scan.group, scan.part) for scan in scans) == [("a", "train"), ("b", "validation")]
    assert all(scan.thumbnail.size and scan.source_hash and scan.pixels for scan in scans)


def test_copies_in_another_store_are_known_and_others_are_not(trained, tmp_path):
    """A copy has another patient, another name and another source; a resampled one looks alike."""
    store = make_store(tmp_path / "other", [])
    add_volume(store, synthetic_hu((40, 44, 40), 0), name="renamed", group="renamed")
    add_volume(store, synthetic_hu((40, 48, 40), 1) + np.int16(3), name="of b", group="of b")
    add_volume(store, synthetic_hu((40, 44, 40), 7), name="new", group="new")
    known = known_scans([trained])
    leaders, notes = known.patients(store)
    assert same_patients(leaders, known.groups("train")) & {"renamed", "of b", "new"} == {"renamed"}
    assert same_patients(leaders, known.groups("validation")) & {"renamed", "of b", "new"} == {"of b"}
    assert notes == ()


def test_a_scan_without_a_body_is_known_by_its_pixels_and_the_rest_is_said(tmp_path):
    air, body = synthetic_hu((32, 32, 32), 3), np.zeros((32, 32, 32), bool)
    for name in ("s", "other"):
        store = make_store(tmp_path / name, [])
        add_volume(store, air, name=f"air of {name}", group=f"air of {name}", body=body)
        if name == "s":
            (tmp_path / "run").mkdir()
            record_scans(tmp_path / "run", [store], Split(("air of s",), ()))
    known = known_scans([tmp_path / "run"])
    leaders, notes = known.patients(store)
    assert leaders["air of s"] == leaders["air of other"]
    assert "no body in 1 of 1 scan," in notes[0]
    assert "in 1 of 1 volume" in notes[1]


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_run_that_keeps_nothing_says_so(trained, tmp_path, damage):
    run = shutil.copytree(trained, tmp_path / "run")
    if damage == "missing":
        (run / SCANS).unlink()
    else:
        data = (run / SCANS).read_bytes()
        (run / SCANS).write_bytes(data[: len(data) // 2] if damage == "cut" else b"PAR1 and nothing more PAR1")
    known = known_scans([trained, run])
    assert len(known.scans) == 2
    assert len(known.notes) == 1 and str(run) in known.notes[0] and "would be scored as new" in known.notes[0]


def test_scans_of_earlier_weights_stay_known(trained, tmp_path):
    store = make_store(tmp_path / "s", [(32, 32, 32)])
    (group,) = {volume.group for volume in store.volumes()}
    record_scans(tmp_path, [store], Split((group,), ()), [replace(one, part=EARLIER) for one in read_scans(trained)])
    known = known_scans([tmp_path])
    assert known.groups("train") == {group} and known.groups(EARLIER) == {"a", "b"}
