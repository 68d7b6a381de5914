"""The maps against shapes whose share of each cell is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.stores import cells

from maesil.ingest.maps import body_map, valid_map
from maesil.types import AIR_HU

FULL = 255


def chest(shape, spacing, *, table: bool = True, lungs: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU, the body (lungs included) and the table of a man of 320 x 220 mm, feet and head beyond the scan."""
    z, y, x = np.moveaxis(np.moveaxis(np.indices(shape, dtype=np.float64), 0, -1) * spacing, -1, 0)
    height, depth, width = (n * mm for n, mm in zip(shape, spacing, strict=True))
    y, x = y - depth / 2 + 30, x - width / 2
    body = (x / 160) ** 2 + (y / 110) ** 2 < 1
    hu = np.where(body, 40.0, -1000.0)
    if lungs:
        for side in (-1, 1):
            lung = ((x - side * 75) / 55) ** 2 + (y / 70) ** 2 + ((z - height / 2) / (height * 0.6)) ** 2 < 1
            hu[lung] = -850
    couch = (np.abs(x) < 230) & (y > 122) & (y < 126)
    couch |= (np.abs(x) < 230) & (y > 150) & (y < 153)
    if table:
        hu[couch] = -200
        hu[(np.abs(x) < 230) & (y >= 126) & (y <= 150)] = -930
    noise = np.random.default_rng(0).normal(0, 12, shape)
    return np.clip(hu + noise, AIR_HU, 3071).astype(np.int16), body, couch


CASES = [((48, 120, 160), (3.0, 3.0, 3.0)), ((40, 128, 170), (5.0, 2.7, 2.7)), ((37, 181, 243), (2.0, 2.0, 2.0))]


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_body_share_of_every_cell(shape, spacing):
    hu, body, couch = chest(shape, spacing)
    valid = valid_map(np.ones(shape, bool))
    found = body_map(hu, valid, spacing).astype(float) / FULL
    truth = cells(body).astype(float) / FULL
    assert found.shape == truth.shape
    assert np.abs(found - truth).mean() < 0.01
    assert np.abs(found - truth).max() < 0.35  # a cell on the skin, found on 3 mm voxels
    assert found.sum() == pytest.approx(truth.sum(), rel=0.03)
    assert (found[truth == 1] > 0.99).all()  # the inside is full: lungs too
    only_table = (cells(couch) > 0) & (truth == 0)
    assert only_table.any() and found[only_table].max() < 0.02


def test_lungs_cut_by_the_ends_of_the_scan_are_body():
    hu, body, _ = chest((48, 120, 160), (3.0, 3.0, 3.0))
    lung = (hu < -700) & body
    assert lung[0].any() and lung[-1].any()
    found = body_map(hu, valid_map(np.ones(hu.shape, bool)), (3.0,) * 3)
    inside = cells(lung) > 200
    assert inside.any() and (found[inside] > 240).all()


def test_a_table_that_touches_the_back_is_cut_off():
    shape, spacing = (40, 120, 160), (3.0, 3.0, 3.0)
    hu, body, couch = chest(shape, spacing)
    _, y, x = np.indices(shape)
    bridge = (np.abs(x - 80) < 3) & (y > 80) & (y < 100) & ~body
    hu[bridge] = -200
    found = body_map(hu, valid_map(np.ones(shape, bool)), spacing)
    far = (cells(couch) > 0) & (cells(body | bridge) == 0)
    assert found[far].max() < 5


def test_an_empty_scan_has_no_body():
    hu = np.full((20, 30, 30), -1000, np.int16)
    assert not body_map(hu, valid_map(np.ones(hu.shape, bool)), (2.0,) * 3).any()


@pytest.mark.parametrize("spacing", [(0.3, 0.3, 0.3), (1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (10.0, 10.0, 10.0)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 8, 7), (17, 40, 33)])
def test_a_scan_full_of_tissue_is_all_body(shape, spacing):
    """A small field of view shows no air at all. Voxels beyond the volume are never body."""
    hu = np.full(shape, 40, np.int16)
    valid = valid_map(np.ones(shape, bool))
    found = body_map(hu, valid, spacing)
    assert found.shape == valid.shape
    # The body is found on merged voxels: at the outer edge one of them may reach beyond the volume, or fall short.
    assert np.abs(found.astype(int) - valid)[tuple(slice(0, n // 8) for n in shape)].max(initial=0) == 0
    assert (found <= valid).all()


def test_body_never_exceeds_valid():
    hu, _, _ = chest((40, 120, 160), (3.0, 3.0, 3.0))
    mask = np.zeros(hu.shape, bool)
    mask[5:37, 20:90, 11:120] = True
    hu[~mask] = AIR_HU
    valid = valid_map(mask)
    assert (body_map(hu, valid, (3.0,) * 3) <= valid).all()


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(bool, st.tuples(*[st.integers(1, 20)] * 3)))
def test_valid_map_is_the_share_and_only_full_is_255(mask):
    found = valid_map(mask)
    np.testing.assert_allclose(found, cells(mask), atol=1)
    padded = np.pad(mask, [(0, -n % 8) for n in mask.shape])
    z, y, x = found.shape
    count = padded.reshape(z, 8, y, 8, x, 8).sum(axis=(1, 3, 5))
    np.testing.assert_array_equal(found == 255, count == 512)
    np.testing.assert_array_equal(found == 0, count == 0)


@pytest.mark.parametrize("missing", [1, 2, 511])
def test_almost_full_and_almost_empty_cells(missing):
    mask = np.ones(512, bool)
    mask[:missing] = False
    (share,) = valid_map(mask.reshape(8, 8, 8)).ravel()
    assert 0 < share < 255
