"""Smaller levels: near to cubes, means of what was scanned, and the same whatever the slabs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lanes import slow_but
from support.stores import cells

from maesil.store.pyramid import levels_below, mean_of_valid, smaller
from maesil.types import AIR_HU


def brute_force(hu, valid, halved):
    """The definition, voxel by voxel."""
    shape = [-(-n // step) for n, step in zip(hu.shape, halved, strict=True)]
    out, inside = np.full(shape, AIR_HU, np.int16), np.zeros(shape, bool)
    for index in product(*map(range, shape)):
        box = tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, halved, strict=True))
        if valid[box].any():
            out[index], inside[index] = np.rint(hu[box][valid[box]].astype(np.float64).mean()), True
    return out, inside


@given(st.tuples(*[st.integers(1, 7)] * 3), st.tuples(*[st.integers(1, 2)] * 3), st.integers(0, 2**32 - 1))
def test_a_level_is_the_mean_of_the_valid_voxels_of_each_block(shape, halved, seed):
    rng = np.random.default_rng(seed)
    hu = rng.integers(-32768, 32767, shape, dtype=np.int16)
    valid = rng.random(shape) < rng.random()
    expected = brute_force(hu, valid, halved)
    for found, wanted in zip(mean_of_valid(hu, valid, halved), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    everything = brute_force(hu, np.ones(shape, bool), halved)
    np.testing.assert_array_equal(mean_of_valid(hu, None, halved)[0], everything[0])


@pytest.mark.parametrize("slab", slow_but((0, 8, 16, 64), (16,)))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0)])
def test_padding_is_left_out_and_slabs_change_nothing(slab, spacing):
    rng = np.random.default_rng(1)
    valid = np.zeros((73, 80, 90), bool)
    valid[:60, 4:71, 9:] = True
    hu = np.where(valid, rng.integers(-1000, 1000, valid.shape), AIR_HU).astype(np.int16)
    above, inside = hu, valid
    made = smaller(hu, cells(valid), spacing, np.zeros, slab)
    assert made
    for level, found in made:
        above, inside = brute_force(above, inside, level.halved)
        np.testing.assert_array_equal(found, above)


def test_air_as_dark_as_padding_counts_inside_the_scan():
    hu = np.full((65, 16, 16), AIR_HU, np.int16)
    hu[::2] = -1000
    ((_, found),) = smaller(hu, cells(np.ones(hu.shape, bool)), (1.0, 1.0, 1.0), np.zeros)
    assert set(np.unique(found[:32])) == {-1012}


@given(
    st.tuples(*[st.integers(1, 700)] * 3),
    st.tuples(*[st.floats(0.2, 10.0)] * 3),
)
def test_levels_come_near_to_cubes(shape, spacing):
    levels = levels_below(shape, spacing)
    assert bool(levels) == (max(shape) > 64)
    before = np.array((1, 1, 1))
    for level in levels:
        factors = np.array(level.factors)
        assert (factors // before).tolist() == list(level.halved) and max(level.halved) == 2
        assert level.shape == tuple(-(-n // f) for n, f in zip(shape, factors.tolist(), strict=True))
        steps = np.array(spacing) * factors
        many = np.array(level.shape) > 1
        # An axis was left alone only where its voxels are long already.
        kept = (np.array(level.halved) == 1) & many
        assert all(steps[kept] >= steps[np.array(level.halved) == 2].min() / 2 * np.sqrt(2) * (1 - 1e-9))
        before = factors
    assert not levels or max(levels[-1].shape) <= 64


def test_thick_slices_wait_for_the_plane():
    factors = [level.factors for level in levels_below((100, 512, 512), (5.0, 0.7, 0.7))]
    assert factors[:3] == [(1, 2, 2), (1, 4, 4), (1, 8, 8)]
