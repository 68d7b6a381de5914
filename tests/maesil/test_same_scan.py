from __future__ import annotations

import numpy as np
import pytest
from support.stores import add_volume, make_store

from maesil.cache.reader import SuperpatchReader
from maesil.same_scan import merge_groups, same_scan, thumbnail


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
def reader(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("same") / "s", [], superpatch=64)
    for name, seed, spacing, start in (
        ("fine", 1, (3.0, 3.0, 3.0), 0.0),
        ("coarse", 1, (5.0, 4.0, 4.0), 0.0),
        ("moved", 2, (3.0, 3.0, 3.0), 13.0),
        ("other", 2, (3.0, 3.0, 3.0), 0.0),
        ("third", 3, (4.0, 3.0, 3.0), 0.0),
    ):
        add_volume(store, patient(seed, spacing, start), name=name, group=name, spacing=spacing)
    return SuperpatchReader(store)


def test_a_scan_is_known_again_resampled_and_moved_and_others_are_not(reader):
    merged = merge_groups([(reader, volume) for volume in reader.volumes.values()])
    assert merged == {"fine": "coarse", "coarse": "coarse", "other": "moved", "moved": "moved", "third": "third"}


def test_thumbnails_have_cells_of_8_mm(reader):
    by_name = {volume.group: thumbnail(reader, volume) for volume in reader.volumes.values()}
    assert np.abs(np.subtract(by_name["fine"].shape, by_name["coarse"].shape)).max() <= 1
    assert np.abs(np.subtract(by_name["fine"].shape, (25, 20, 24))).max() <= 1


def test_a_thumbnail_holds_means():
    from maesil.same_scan import _averaged

    values = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    np.testing.assert_allclose(_averaged(values, 0, 3.0), values.reshape(4, 3, 3).mean(axis=1), rtol=1e-5)
    by_half = np.repeat(values, 2, axis=0)  # 2.5 voxels are 5 halves
    np.testing.assert_allclose(_averaged(values, 0, 2.5), by_half[:20].reshape(4, 5, 3).mean(axis=1), rtol=1e-5)


def test_empty_and_flat_thumbnails_match_nothing():
    flat, empty = np.zeros((4, 4, 4), np.float32), np.zeros((0, 0, 0), np.float32)
    assert not same_scan(flat, flat)
    assert not same_scan(empty, empty)
