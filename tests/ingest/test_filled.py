"""Filling is found whatever its number and its shape; what was scanned is not taken for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maesil.errors import Refused
from maesil.geometry import Affine
from maesil.ingest.filled import filled_border
from maesil.ingest.plausible import plausible
from maesil.ingest.scanned import Scanned

SHAPE = (26, 44, 48)
LPS: Affine = np.array([[0, 0, 5.0, 0], [0, 5.0, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])


def scan(shape=SHAPE, noise: float = 12.0, seed: int = 0, radius: float = 0.75) -> np.ndarray:
    """A trunk with two lungs and a spine in air, ``[z, y, x]`` HU with noise; it goes on beyond both ends."""
    _, y, x = (2 * (i + 0.5) / n - 1 for i, n in zip(np.indices(shape), shape, strict=True))
    hu = np.where(np.hypot(x, y) < radius, 45.0, -1000.0)
    for side in (-0.35, 0.35):
        hu[np.hypot(x - side, y + 0.1) < 0.25] = -850
    hu[np.hypot(x, y - 0.5) < 0.12] = 500
    return np.rint(hu + np.random.default_rng(seed).normal(0, noise, shape)).astype(np.float32)


def everywhere(hu: np.ndarray) -> np.ndarray:
    return np.ones(hu.shape, bool)


def found_in(hu: np.ndarray) -> np.ndarray:
    filled = filled_border(hu, everywhere(hu))
    return np.zeros(hu.shape, bool) if filled is None else filled


@st.composite
def regions(draw) -> np.ndarray:
    """A region that touches the border: half-spaces in any direction, boxes at a face and what joins them."""
    z, y, x = (2 * i / (n - 1) - 1 for i, n in zip(np.indices(SHAPE), SHAPE, strict=True))
    mask = np.zeros(SHAPE, bool)
    if draw(st.booleans()):
        direction = np.array(draw(st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: max(map(abs, v)) > 0.2)))
        along = z * direction[0] + y * direction[1] + x * direction[2]
        mask |= along > np.abs(direction).sum() * draw(st.floats(0.05, 0.6))
    for _ in range(draw(st.integers(0, 3))):
        axis, high = draw(st.integers(0, 2)), draw(st.booleans())
        box = [slice(start := draw(st.integers(0, n - 8)), start + draw(st.integers(6, 20))) for n in SHAPE]
        depth = draw(st.integers(1, 12))
        box[axis] = slice(SHAPE[axis] - depth, None) if high else slice(0, depth)
        mask[tuple(box)] = True
    return mask


VALUES = st.one_of(st.integers(-1500, -1151), st.integers(-899, 3500))


@settings(max_examples=40, deadline=None)
@given(regions(), VALUES, st.integers(0, 9))
def test_a_constant_region_at_the_border_is_filling_whatever_its_number_and_shape(mask, value, seed):
    hu = scan(seed=seed)
    hu[mask] = value
    found = found_in(hu)
    assert (found & ~mask).sum() <= (hu == value)[~mask].sum() and not (found & (hu != value)).any()
    solid = _where_a_cube_fits(mask)
    assert found[solid].all()
    if value > 1000:  # only a spine cut by it could be taken for metal
        return
    assert (mask & ~found).sum() <= 0.02 * mask.sum()


def _where_a_cube_fits(mask: np.ndarray) -> np.ndarray:
    solid = np.zeros(mask.shape, bool)
    windows = np.lib.stride_tricks.sliding_window_view(mask, (3, 3, 3)).all(axis=(3, 4, 5))
    for z, y, x in np.ndindex(3, 3, 3):
        solid[z : z + windows.shape[0], y : y + windows.shape[1], x : x + windows.shape[2]] |= windows
    return solid


@settings(max_examples=20, deadline=None)
@given(st.floats(3, 60), st.floats(0.3, 2.0), st.integers(0, 99))
def test_a_body_that_touches_the_border_or_is_cut_by_it_is_no_filling(noise, radius, seed):
    """From radius 1 on the field of view is truncated; at 2 there is no air in it."""
    assert not found_in(scan(noise=noise, radius=radius, seed=seed)).any()


@settings(max_examples=20, deadline=None)
@given(st.integers(-900, 1500), st.integers(2, 9), st.integers(0, 9))
def test_a_constant_organ_inside_the_body_is_no_filling(value, edge, seed):
    hu = scan(seed=seed)
    hu[8 : 8 + edge, 18 : 18 + edge, 20 : 20 + edge] = value
    assert not found_in(hu).any()


@pytest.mark.parametrize("limits", [(-1024, 3071), (-1000, 1000), (-1010, 400)])
@pytest.mark.parametrize("noise", [2, 15, 100, 220])
def test_air_that_is_clipped_is_no_filling(limits, noise):
    assert not found_in(scan(noise=noise).clip(*limits)).any()


@pytest.mark.parametrize("lower", [20, 30, 40])
def test_air_that_is_clipped_around_and_above_its_mean_is_no_filling(lower):
    clipped = (scan(noise=6) - lower).clip(-1024)
    assert (clipped == -1024).mean() > 0.1
    assert not found_in(clipped).any()


@pytest.mark.parametrize("step", [14, 40, 100])
def test_tissue_that_coarse_numbers_make_constant_is_no_filling(step):
    """The body is cut by the lower and the upper end of the scan, so it touches the border."""
    coarse = np.round(scan(noise=1) / step) * step
    assert not found_in(coarse).any()


def test_metal_that_is_clipped_and_cut_by_the_end_of_the_scan_is_no_filling():
    hu = scan()
    z, y, x = np.indices(SHAPE)
    hu += np.clip(12000 - 2500 * np.hypot(y - 30, x - 24), 0, None) * (z > 5)
    hu = hu.clip(-1024, 3071)
    assert (hu[-1] == 3071).sum() > 25
    assert not found_in(hu).any()


@pytest.mark.parametrize("value", [-1024, -1000, 0, 3071])
def test_nothing_is_left_of_a_constant_volume_so_it_is_left_alone(value):
    assert filled_border(np.full(SHAPE, value, np.float32), np.ones(SHAPE, bool)) is None


@pytest.mark.parametrize("value", [-2000, -500, 0, 300])
def test_the_corners_outside_a_round_field_of_view_are_filling(value):
    hu, (_, y, x) = scan(), np.indices(SHAPE)
    corners = np.hypot(y - 21.5, x - 23.5) > 22
    hu[corners] = value
    assert (found_in(hu) == corners).mean() > 0.999


@pytest.mark.parametrize("value", [-1024, -1000, -950])
def test_corners_of_constant_air_stay_valid(value):
    hu, (_, y, x) = scan(), np.indices(SHAPE)
    hu[np.hypot(y - 21.5, x - 23.5) > 22] = value
    assert not found_in(hu).any()


def scanned(hu: np.ndarray, **more) -> Scanned:
    return Scanned(hu, everywhere(hu), LPS, (), {"kind": "nifti"}, **more)


@pytest.mark.parametrize("value", [-500, 0, 40, 700])
def test_filling_is_taken_out_of_the_valid_voxels_with_a_note(value):
    hu = scan()
    hu[:, :12] = hu[:, :, :9] = value
    result = plausible(scanned(hu))
    assert "filled_border" in result.notes
    np.testing.assert_array_equal(~result.valid, found_in(hu))
    mask = np.zeros(SHAPE, bool)
    mask[:, :12] = mask[:, :, :9] = True
    assert not result.valid[mask].any() and result.valid[~mask].mean() > 0.998
    assert result.source["filled_border_voxels"] == np.count_nonzero(~result.valid)


def test_all_eight_corners_may_be_filling_while_there_is_air_left():
    hu, (z, y, x) = scan(), np.indices(SHAPE)
    turned = (np.abs(y - 22) + np.abs(x - 24) > 30) | (z < 2) | (z > 23)
    hu[turned] = 0
    result = plausible(scanned(hu))
    assert not result.valid[turned].any() and result.valid[~turned].all()


def test_air_that_was_replaced_is_refused():
    hu = scan()
    with pytest.raises(Refused) as caught:
        plausible(scanned(np.where(hu < -900, np.float32(0), hu)))
    assert caught.value.code == "odd_background"


def test_a_window_that_is_accepted_keeps_its_air():
    hu = scan().clip(-160, 240)
    result = plausible(scanned(hu), accept=("windowed", "odd_background"))
    assert result.valid.all() and "accepted_windowed" in result.notes


def test_slices_interpolated_within_filling_are_not_known():
    hu = scan()
    hu[:, :12] = 0
    filled = np.zeros(SHAPE, bool)
    filled[7] = True
    result = plausible(Scanned(hu, ~filled, LPS, (), {}, filled=filled))
    assert not result.known[:, :12].any() and result.known[:, 13:].all() and not result.valid[7].any()
