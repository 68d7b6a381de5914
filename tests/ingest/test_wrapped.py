"""Words that ran over their end are known by their jumps, however few; metal, noise and padding are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from maesil.errors import Refused
from maesil.ingest.plausible import plausible
from maesil.ingest.scanned import Scanned
from maesil.ingest.wrapped import wrapped

SHAPE = (12, 64, 64)


def body(seed: int = 0, noise: float = 15.0, air: float = -1000.0) -> np.ndarray:
    """An ellipse of muscle, fat and bone in air, blurred as a scanner blurs, with noise."""
    _, y, x = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]] - np.array([0, 32, 32])[:, None, None, None]
    hu = np.full(SHAPE, air)
    hu[(x / 26) ** 2 + (y / 20) ** 2 < 1] = -100
    hu[(x / 22) ** 2 + (y / 16) ** 2 < 1] = 45
    hu[(x + 8) ** 2 + y**2 < 25] = 900
    return gaussian_filter(hu, (0, 0.7, 0.7)) + np.random.default_rng(seed).normal(0, noise, SHAPE)


def with_metal(hu: np.ndarray, peak: float, blur: float = 0.7, where: tuple[int, int] = (30, 44)) -> np.ndarray:
    metal = np.zeros(SHAPE)
    y, x = where
    metal[3:9, y : y + 5, x : x + 4] = 1
    metal = gaussian_filter(metal, (0, blur, blur)) if blur else metal
    return hu * (1 - metal) + peak * metal


def checked(hu: np.ndarray) -> Scanned:
    return plausible(Scanned(hu.astype(np.float32), np.ones(SHAPE, bool), np.eye(4)[[2, 1, 0, 3]], (), {}))


def refused(hu: np.ndarray) -> str:
    with pytest.raises(Refused) as caught:
        checked(hu)
    return caught.value.code


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.02, 0.2]))
def test_specks_of_underflow_are_found_however_few(seed, share):
    hu = np.rint(body(seed)) + 1024
    specks = (hu < 60) & (np.random.default_rng(seed).random(SHAPE) < share)
    hu[specks] = -1 - np.arange(specks.sum()) % 9
    assert refused((hu.astype(np.int64) % 2**16) - 1024) in ("wrapped", "unsigned")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_specks_in_12_bits_are_found(seed):
    hu = np.rint(body(seed)) + 1024
    specks = (hu < 60) & (np.random.default_rng(seed).random(SHAPE) < 0.005)
    hu[specks] = -1 - np.arange(specks.sum()) % 9
    assert refused((hu.astype(np.int64) % 2**12) - 1024) == "wrapped"


@pytest.mark.parametrize("air", [-1000.0, -300.0])
def test_hu_in_12_bits_read_as_unsigned(air):
    """With air around, and with fat up to the edge."""
    hu = np.rint(body(air=air)).astype(np.int64)
    assert list(wrapped((hu % 2**12).astype(np.float32), np.ones(SHAPE, bool)))
    assert refused(hu % 2**12) in ("wrapped", "too_dense")


@pytest.mark.parametrize("blur", [0.0, 0.7])
@pytest.mark.parametrize("peak", [36000, 45000, 60000])
def test_metal_beyond_16_bits(peak, blur):
    hu = np.rint(with_metal(body(), peak, blur)).astype(np.int64)
    assert refused((hu + 2**15) % 2**16 - 2**15) == "wrapped"


@pytest.mark.parametrize("blur", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("where", [(30, 44), (2, 2)])
@pytest.mark.parametrize("peak", [2500, 3071, 8000, 15000, 30000])
def test_metal_is_none_in_tissue_or_in_air(peak, where, blur):
    for top in (3071, 32767):
        hu = with_metal(body(), peak, blur, where).clip(-1024, top)
        assert not list(wrapped(hu.astype(np.float32), np.ones(SHAPE, bool)))


def test_streaks_beside_metal_are_none_and_stay():
    hu = with_metal(body(), 12000, 0.7)
    streak = with_metal(np.zeros(SHAPE), -3500, 1.5, (30, 53))
    found = checked(hu + streak)
    assert found.hu.min() < -1500 and found.valid.all() and "undeclared_padding" not in found.notes


@pytest.mark.parametrize("noise", [100.0, 220.0, 300.0])
def test_noise_of_air_is_inside_the_scan(noise):
    found = checked(np.rint(np.where(body() < -500, body(1, noise), body(1, 60))))
    assert found.valid.all() and not found.notes
    assert noise < 200 or found.hu.min() < -1500


@pytest.mark.parametrize("values", [[-2000], [-3024, -2000], [-2000, -2001, -1999]])
def test_padding_at_the_margin_is_padding_beside_any_noise(values):
    _, y, x = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]] - np.array([0, 32, 32])[:, None, None, None]
    outside = x**2 + y**2 > 32**2
    hu = np.where(outside, np.resize(values, SHAPE), body(noise=60.0))
    found = checked(hu)
    np.testing.assert_array_equal(found.valid, ~outside)
    assert "undeclared_padding" in found.notes
