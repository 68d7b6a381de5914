"""One matrix an axis means the same as SimpleITK in three dimensions."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from maesil.ingest.resample import _interpolate
from maesil.ingest.separable import apply_maps, axis_maps, gaussian, share_axes

SIZES = st.tuples(*[st.integers(1, 40)] * 3)


def by_simpleitk(values, shape, to_source, variance):
    image = gaussian(sitk.GetImageFromArray(values), [float(v) for v in variance[::-1]])
    return _interpolate(image, shape, to_source)


@settings(max_examples=40, deadline=None)
@given(
    source_shape=SIZES,
    shape=SIZES,
    steps=st.tuples(*[st.floats(0.3, 4)] * 3),
    starts=st.tuples(*[st.floats(-3, 3)] * 3),
    seed=st.integers(0, 1000),
)
def test_the_same_as_in_three_dimensions(source_shape, shape, steps, starts, seed):
    """Smoothing at the borders, interpolation between centres, and zero beyond the outer faces."""
    to_source = np.diag([*steps, 1.0])
    to_source[:3, 3] = starts
    for axis in range(3):  # which side of an outer face a point just on it falls to is a matter of rounding
        at = starts[axis] + steps[axis] * np.arange(shape[axis])
        assume(min(np.abs(at + 0.5).min(), np.abs(at - source_shape[axis] + 0.5).min()) > 1e-6)
    variance = np.where(np.array(steps) > 1, 0.25 * (np.array(steps) ** 2 - 1), 0)
    values = np.random.default_rng(seed).normal(0, 100, source_shape).astype(np.float32)
    ours = apply_maps(axis_maps(source_shape, shape, to_source, variance), values)
    assert ours.shape == shape and ours.dtype == np.float32
    np.testing.assert_allclose(ours, by_simpleitk(values, shape, to_source, variance), rtol=0, atol=2e-3)


def test_a_view_that_is_mirrored_and_transposed_is_read_right():
    """Canonical volumes are views: their strides are negative or out of order."""
    values = np.random.default_rng(0).normal(0, 100, (20, 21, 22)).astype(np.float32).transpose(2, 0, 1)[::-1, :, ::-1]
    maps = axis_maps(values.shape, (11, 13, 9), np.diag([2.0, 1.5, 2.3, 1.0]), np.array([0.75, 0.3, 1.07]))
    np.testing.assert_array_equal(apply_maps(maps, values), apply_maps(maps, np.ascontiguousarray(values)))


@pytest.mark.parametrize(("shear", "shared"), [(0.0, True), (1e-12, True), (1e-3, False)])
def test_a_sheared_grid_does_not_share_axes(shear, shared):
    to_source = np.diag([2.0, 1.5, 1.5, 1.0])
    to_source[1, 0] = shear
    assert share_axes(to_source) is shared
