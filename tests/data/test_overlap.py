"""Which scans of a store are known elsewhere, by identity, source, voxels or looks; others are not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.command_line import fails, run
from support.copies import COPIES
from support.stores import add_volume, make_store

from maesil.data.known_scans import record_scans
from maesil.data.overlap import overlaps
from maesil.data.split import Split

SPACING = (6.0, 6.0, 6.0)


def scan(seed: int) -> np.ndarray:
    """An ellipsoid of slow waves in air: int16 HU."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.arange(48) - 23.5] * 3, indexing="ij")
    waves = sum(np.sin(k[0] * z + k[1] * y + k[2] * x + k[3]) for k in rng.normal(0, [0.25] * 3 + [3], (12, 4)))
    inside = (z / 21) ** 2 + (y / 18) ** 2 + (x / 20) ** 2 < 1
    return np.rint(np.where(inside, 60 * waves, -1000)).astype(np.int16)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store that was trained on, and one that repeats three of its scans beside a new one."""
    root = tmp_path_factory.mktemp("overlap")
    trained, asked = make_store(root / "trained", [], superpatch=64), make_store(root / "asked", [], superpatch=64)
    for seed in range(4):
        add_volume(trained, scan(seed), name=str(seed), group=str(seed), spacing=SPACING)
    add_volume(asked, scan(0), name="0", group="0", spacing=SPACING)
    add_volume(asked, scan(1), name="renamed", group="renamed", spacing=SPACING)
    add_volume(asked, COPIES["mirrored and cut"](scan(2)), name="cut", group="cut", spacing=SPACING)
    add_volume(asked, scan(9), name="new", group="new", spacing=SPACING)
    (root / "run").mkdir()
    record_scans(root / "run", [trained], Split(("0", "2"), ("3",)))
    return asked, trained, root / "run"


def test_known_scans_are_found_by_the_surest_sign_and_a_new_one_is_not(stores):
    asked, trained, run = stores
    found, notes = overlaps(asked, [trained], [run])
    told = {(one.group, one.where, one.part): one.by for one in found}
    in_store, in_run = str(trained.path), str(run)
    assert told == {
        ("0", in_store, ""): "identity",
        ("0", in_run, "train"): "identity",
        ("renamed", in_store, ""): "voxels",
        ("cut", in_store, ""): "thumbnail",
        ("cut", in_run, "train"): "thumbnail",
    }
    assert notes == ()


def test_a_run_that_keeps_nothing_is_said(stores, tmp_path):
    found, notes = overlaps(stores[0], [], [tmp_path])
    assert found == [] and len(notes) == 1 and "keeps nothing" in notes[0]


def test_the_command_lists_them_and_ends_with_1(stores):
    asked, trained, run_dir = (getattr(one, "path", one) for one in stores)
    code, told, _ = run("store", "overlap", asked, trained, "--run", run_dir)
    assert code == 1 and "3 scans of" in told and told.count("by thumbnail") == 2
    code, told, _ = run("store", "overlap", asked, trained, "--json")
    assert code == 1 and len(json.loads(told)["overlaps"]) == 3


def test_a_store_of_others_ends_with_0_and_nothing_to_compare_with_is_refused(stores, tmp_path):
    other = make_store(tmp_path / "other", [], superpatch=64)
    add_volume(other, scan(20), name="other", group="other", spacing=SPACING)
    code, told, _ = run("store", "overlap", other.path, stores[1].path)
    assert code == 0 and told.startswith("0 scans of")
    assert "--run" in fails(2, "store", "overlap", other.path)
