"""Slices that cannot be of one scan are found by their pixels; noise, anatomy and steps between slices are not."""

from __future__ import annotations

import numpy as np
import pytest
from support.ct_phantom import base_affine, sample

from maesil.ingest.coherent import incoherent


def phantom() -> np.ndarray:
    return sample(base_affine()).astype(np.float32)


def codes(hu: np.ndarray, valid: np.ndarray | None = None) -> set[str]:
    return {doubt.code for doubt in incoherent(hu, np.ones(hu.shape, bool) if valid is None else valid)}


@pytest.mark.parametrize("noise", [0, 15, 120])
def test_a_scan_has_no_doubts(noise):
    assert not codes(phantom() + np.random.default_rng(0).normal(0, noise, phantom().shape).astype(np.float32))


def test_noise_alone_has_no_doubts():
    assert not codes(np.random.default_rng(0).normal(40, 100, (40, 30, 30)).astype(np.float32))


def test_air_that_ends_between_two_slices_has_no_doubts():
    hu = np.full((40, 30, 30), -1000, np.float32)
    hu[20:] = 40
    assert not codes(hu)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("noise", [0, 20])
def test_two_passes_in_one_are_found_along_any_axis(axis, noise):
    hu = phantom() + np.random.default_rng(0).normal(0, noise, phantom().shape).astype(np.float32)
    hu[1::2] = np.roll(hu[1::2], 3, axis=1)
    assert "woven_passes" in codes(np.moveaxis(hu, 0, axis))


@pytest.mark.parametrize("slices", [[7], [0], [10, 11, 12], range(0, 24, 2)])
@pytest.mark.parametrize("offset", [1024, -1024])
def test_slices_of_another_rescale_are_found(slices, offset):
    hu = phantom()
    hu[list(slices)] += offset
    assert "slice_offset" in codes(hu)


def test_what_is_not_valid_takes_no_part():
    hu, valid = phantom(), np.ones(phantom().shape, bool)
    hu[7], valid[7] = 1e9, False
    hu[12] = np.nan
    valid[12] = False
    assert not codes(hu, valid)
