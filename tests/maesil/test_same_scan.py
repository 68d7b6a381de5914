from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.stores import add_volume, make_store

from maesil.index import VOLUMES_KEY, write_index
from maesil.same_scan import THUMBNAILS_KEY, merge_groups, patients, same_scan, thumbnails
from maesil.store import Store


def patient(seed: int, spacing: tuple[float, float, float], start: float = 0.0) -> np.ndarray:
    """An ellipsoid of waves in air, a known function of position (mm): int16 HU of a box of 240 mm from ``start``."""
    rng = np.random.default_rng(seed)
    axes = [np.arange(int(240 / mm)) * mm - 120 + mm / 2 + start for mm in spacing]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    waves = [np.sin(k @ np.stack([z, y, x]).reshape(3, -1) + phase) for k, phase in
             zip(rng.normal(0, 0.04, (12, 3)), rng.uniform(0, 6, 12), strict=True)]  # fmt: skip
    inside = (z / 100) ** 2 + (y / 80) ** 2 + (x / 95) ** 2 < 1
    hu = np.where(inside, 60 * np.sum(waves, axis=0).reshape(z.shape), -1000)
    return np.rint(hu + np.random.default_rng(0).normal(0, 15, hu.shape)).astype(np.int16)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("same") / "s", [], superpatch=64)
    for name, seed, spacing, start in (
        ("fine", 1, (3.0, 3.0, 3.0), 0.0),
        ("coarse", 1, (5.0, 4.0, 4.0), 0.0),
        ("moved", 2, (3.0, 3.0, 3.0), 13.0),
        ("other", 2, (3.0, 3.0, 3.0), 0.0),
        ("third", 3, (4.0, 3.0, 3.0), 0.0),
    ):
        add_volume(store, patient(seed, spacing, start), name=name, group=name, spacing=spacing)
    return store


def test_a_scan_is_known_again_resampled_and_moved_and_others_are_not(store):
    merged = {"fine": "coarse", "coarse": "coarse", "other": "moved", "moved": "moved", "third": "third"}
    assert patients([store]) == merged


def test_the_index_keeps_thumbnails_and_says_who_is_whom(store, monkeypatch):
    before = thumbnails(store)
    write_index(store)
    monkeypatch.setattr("maesil.same_scan._made", None)  # nothing is made twice
    kept = thumbnails(Store.open(store.path))
    assert list(kept) == list(before) and all(np.array_equal(kept[name], before[name]) for name in before)
    table = pq.read_table(store.path / VOLUMES_KEY).to_pylist()
    assert {row["group"]: row["patient"] for row in table} == patients([store])


@pytest.mark.parametrize("damage", [b"", b"PAR1"])
def test_damaged_thumbnails_are_made_anew(store, damage):
    before = thumbnails(store)
    store.storage.put(THUMBNAILS_KEY, damage)
    assert all(np.array_equal(one, before[name]) for name, one in thumbnails(store).items())


def test_a_scan_is_known_again_in_another_store(store, tmp_path):
    other = make_store(tmp_path / "s", [], superpatch=64)
    add_volume(other, patient(3, (3.0, 3.0, 3.0)), name="x", group="again", spacing=(3.0, 3.0, 3.0))
    assert patients([store, other])["third"] == "again"


def test_thumbnails_have_cells_of_8_mm(store):
    found = thumbnails(store)
    by_name = {volume.group: found[volume.volume_id] for volume in store.volumes()}
    assert np.abs(np.subtract(by_name["fine"].shape, by_name["coarse"].shape)).max() <= 1
    assert np.abs(np.subtract(by_name["fine"].shape, (25, 20, 24))).max() <= 1


def test_many_are_compared_without_comparing_all_pairs_in_full(monkeypatch):
    rng = np.random.default_rng(0)
    many = [rng.integers(0, 255, (20, 20, 20), np.uint8).repeat(2, 0)[:20] for _ in range(300)]
    compared = []
    monkeypatch.setattr("maesil.same_scan.same_scan", lambda a, b: compared.append(1) or same_scan(a, b))
    names = [str(n) for n in range(301)]
    assert merge_groups(names, [*many, many[7]]) == {name: name for name in names} | {"300": "300", "7": "300"}
    assert len(compared) < 10


def test_a_thumbnail_holds_means():
    from maesil.same_scan import _averaging

    values = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    np.testing.assert_allclose(_averaging(12, 3.0) @ values, values.reshape(4, 3, 3).mean(axis=1), atol=1e-6)
    by_half = np.repeat(values, 2, axis=0)  # 2.5 voxels are 5 halves
    np.testing.assert_allclose(_averaging(12, 2.5) @ values, by_half[:20].reshape(4, 5, 3).mean(axis=1), atol=1e-6)


def test_empty_and_flat_thumbnails_match_nothing():
    flat, empty = np.zeros((4, 4, 4), np.uint8), np.zeros((0, 0, 0), np.uint8)
    assert not same_scan(flat, flat)
    assert not same_scan(empty, empty)
