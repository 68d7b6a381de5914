"""Words wider than BitsStored: unused bits mean nothing, larger values are not cut, and what is unclear is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maesil.errors import Refused
from maesil.ingest.words import WHOLE_WORDS, values_of

BITS = 12


def picture(low: int, high: int, seed: int = 0) -> np.ndarray:
    """Smooth values within two limits, with both of them."""
    y, x = np.mgrid[:40, :48] / 40.0
    wave = np.sin(3 * x + seed) * np.cos(2 * y - seed)
    wave = (wave - wave.min()) / np.ptp(wave)
    return np.rint(low + (high - low) * wave).astype(np.int64)


def with_metal(values: np.ndarray, peak: int) -> np.ndarray:
    metal = values.copy()
    metal[10:15, 20:26] = peak
    return metal


@given(st.sampled_from([0, 1]), st.integers(0, 50), st.sampled_from(["none", "zero", "constant", "random"]))
def test_unused_bits_mean_nothing(signed, seed, kind):
    values = picture(-1000, 1900, seed) if signed else picture(20, 3900, seed)
    beyond = {
        "none": None,
        "zero": np.zeros_like(values),
        "constant": np.full_like(values, 4),
        "random": np.random.default_rng(seed).integers(0, 16, values.shape),
    }[kind]
    words = values if beyond is None else (values & 0xFFF) | (beyond << BITS)
    stored, notes = values_of((words & 0xFFFF).astype(np.uint16).view(np.int16 if signed else np.uint16), BITS)
    np.testing.assert_array_equal(stored, values)
    assert not notes


@pytest.mark.parametrize("peak", [2100, 2600, 3000, 5000, 30000])
def test_metal_beyond_signed_bits_is_read_from_the_whole_words(peak):
    values = with_metal(picture(-1000, 1900), peak)
    stored, notes = values_of(values.astype(np.int16), BITS)
    np.testing.assert_array_equal(stored, values)
    assert notes == {WHOLE_WORDS}


def test_metal_beyond_unsigned_bits_is_read_from_the_whole_words_where_it_is_smooth():
    values = picture(20, 6000)
    stored, notes = values_of(values.astype(np.uint16), BITS)
    np.testing.assert_array_equal(stored, values)
    assert notes == {WHOLE_WORDS}


def test_what_may_be_metal_or_an_overlay_is_refused():
    with pytest.raises(Refused) as caught:
        values_of(with_metal(picture(20, 2000), 5000).astype(np.uint16), BITS)
    assert caught.value.code == "bits_stored"


def test_a_declared_overlay_is_left_out():
    values = picture(20, 2000)
    stored, notes = values_of((values + with_metal(np.zeros_like(values), 4096)).astype(np.uint16), BITS, overlay=True)
    np.testing.assert_array_equal(stored, values)
    assert not notes


def test_declared_padding_beyond_the_bits_is_padding():
    values = picture(20, 2000)
    values[:5] = 63536
    stored, _ = values_of(values.astype(np.uint16), BITS, padding=63536)
    np.testing.assert_array_equal(stored, values)
