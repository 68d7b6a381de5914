"""Resampling against fields known at every point of the patient, and against what noise and garbage must not do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maesil.geometry import spacing_of, world_of
from maesil.ingest.resample import to_canonical, to_grid
from maesil.ingest.scanned import Scanned
from maesil.types import AIR_HU

SLOPE = np.array([1.7, -2.3, 0.9])  # HU per mm


def linear(points: np.ndarray) -> np.ndarray:
    """A field that neither linear interpolation nor a symmetric filter changes."""
    return 40.0 + (points - 50.0) @ SLOPE


def waves(points: np.ndarray) -> np.ndarray:
    """Smooth: wavelengths of 70 mm and more, amplitude 300 HU."""
    x, y, z = np.moveaxis(points, -1, 0)
    return 150 * np.sin(x / 11.5) + 100 * np.cos(y / 13 + z / 15) + 50 * np.sin(z / 12)


def affine_of(seed: int, spacing=(2.4, 1.1, 0.9), shear: float = 0.0, tilt: float = 30.0) -> np.ndarray:
    """A grid turned by up to ``tilt`` degrees about each axis; its slice step leans over by ``shear``."""
    rng = np.random.default_rng(seed)
    turn = np.eye(3)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        angle = np.radians(rng.uniform(-tilt, tilt))
        step = np.eye(3)
        step[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = step @ turn
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.eye(3)[:, ::-1] * spacing  # columns z, y, x
    affine[:3, 0] += shear * spacing[0] * turn[:, 1]
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return affine


def scanned(field, affine, shape=(30, 44, 50), valid=None) -> Scanned:
    index = np.moveaxis(np.indices(shape, dtype=np.float64), 0, -1)
    hu = field(world_of(affine, index)).astype(np.float32)
    return Scanned(hu, np.ones(shape, bool) if valid is None else valid, affine, (), {})


def expected_at(field, result: Scanned) -> np.ndarray:
    index = np.moveaxis(np.indices(result.shape, dtype=np.float64), 0, -1)
    return field(world_of(result.affine, index))


def inside(result: Scanned, source: Scanned, margin_mm: float) -> np.ndarray:
    """Output voxels further than the margin from every face of the source."""
    index = np.moveaxis(np.indices(result.shape, dtype=np.float64), 0, -1)
    back = np.linalg.inv(source.affine)
    at = world_of(result.affine, index) @ back[:3, :3].T + back[:3, 3]
    voxels = margin_mm / np.asarray(spacing_of(source.affine))
    return ((at >= voxels) & (at <= np.asarray(source.shape) - 1 - voxels)).all(axis=-1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spacing=st.tuples(*[st.floats(0.6, 3)] * 3),
    target=st.tuples(*[st.floats(0.8, 4)] * 3),
    shear=st.sampled_from([0.0, 0.0, 0.27, -0.1]),
)
def test_a_linear_field_comes_out_as_it_is(seed, spacing, target, shear):
    source = scanned(linear, affine_of(seed, spacing, shear), (26, 30, 34))
    result = to_grid(source, target)
    here = inside(result, source, 3.5 * max(target)) & result.valid
    if here.any():
        assert np.abs(result.hu - expected_at(linear, result))[here].max() < 0.2
    np.testing.assert_allclose(spacing_of(result.affine), target)


@pytest.mark.parametrize("shear", [0.0, 0.27])
@pytest.mark.parametrize("target", [(1.5, 1.5, 1.5), (2.0, 2.0, 2.0), (0.8, 0.8, 0.8), (3.0, 1.0, 2.5)])
def test_a_smooth_field_is_right_in_the_world(target, shear):
    """Oblique, anisotropic, sheared. What remains is the smoothing itself: sigma is half the target spacing."""
    source = scanned(waves, affine_of(5, shear=shear), (40, 80, 90))
    result = to_grid(source, target)
    here = inside(result, source, 2 * max(target)) & result.valid
    assert here.sum() > 1000
    error = np.abs(result.hu - expected_at(waves, result))[here]
    assert error.mean() < 2.0 and error.max() < 8.0


def test_half_a_voxel_of_shift_would_be_noticed():
    """The tolerance above has teeth: the same result scored half a target voxel aside fails it by far."""
    source = scanned(waves, affine_of(5), (40, 80, 90))
    result = to_grid(source, (2.0, 2.0, 2.0))
    index = np.moveaxis(np.indices(result.shape, dtype=np.float64), 0, -1) + 0.5
    error = np.abs(result.hu - waves(world_of(result.affine, index)))[inside(result, source, 4.0)]
    assert error.mean() > 6.0


@pytest.mark.parametrize("factor", [2.0, 2.5, 3.0])
@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_noise_falls_as_by_averaging(factor, axes):
    """Averaging f samples leaves 1/f of the variance an axis; plain linear interpolation leaves 1/2 to 1."""
    rng = np.random.default_rng(0)
    shape = (60, 61, 62)
    target = tuple(factor if axis in axes else 1.0 for axis in range(3))
    source = Scanned(rng.normal(0, 50, shape).astype(np.float32), np.ones(shape, bool), affine_of(0, (1, 1, 1)), (), {})
    result = to_grid(source, target)
    kept = np.var(result.hu[4:-4, 4:-4, 4:-4]) / 50**2
    box = factor ** -len(axes)
    assert 0.5 ** len(axes) * box < kept < 1.05 * box


def test_the_finer_direction_is_not_smoothed():
    rng = np.random.default_rng(0)
    shape = (30, 40, 40)
    source = Scanned(rng.normal(0, 50, shape).astype(np.float32), np.ones(shape, bool), affine_of(0, (3, 1, 1)), (), {})
    result = to_grid(source, (1.0, 1.0, 1.0))
    # The middle one of three output slices lies on a source slice: its values are the source's own.
    np.testing.assert_allclose(result.hu[1::3], source.hu, atol=0.01)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), target=st.floats(0.7, 5), shear=st.sampled_from([0.0, 0.2]))
def test_a_constant_stays_constant_to_the_border(seed, target, shear):
    source = scanned(lambda p: np.full(p.shape[:-1], 60.0), affine_of(seed, shear=shear), (17, 20, 22))
    result = to_grid(source, (target,) * 3)
    assert np.abs(result.hu[result.valid] - 60.0).max() < 0.05
    assert (result.hu[~result.valid] == AIR_HU).all()
    if not shear:
        assert result.valid.all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), target=st.floats(0.7, 4), garbage=st.sampled_from([1e6, -1e6, np.nan, np.inf]))
def test_garbage_outside_the_scan_never_leaks(seed, target, garbage):
    rng = np.random.default_rng(seed)
    shape = (24, 30, 30)
    _, y, x = np.indices(shape)
    valid = (y - 15) ** 2 + (x - 14) ** 2 < 11**2
    valid &= rng.random(shape) > 0.05  # holes too
    source = scanned(lambda p: np.full(p.shape[:-1], 60.0), affine_of(seed, (2.0, 1.0, 1.0)), shape, valid)
    source.hu[~valid] = garbage
    result = to_grid(source, (target,) * 3)
    assert np.isfinite(result.hu).all()
    assert np.abs(result.hu[result.valid] - 60.0).max() < 0.05
    assert (result.hu[~result.valid] == AIR_HU).all()


@pytest.mark.parametrize("target", [0.8, 1.5, 3.0])
def test_the_valid_region_keeps_its_size_and_place(target):
    shape = (30, 60, 60)
    _, y, x = np.indices(shape)
    valid = (y - 30) ** 2 + (x - 28) ** 2 < 24**2
    source = scanned(linear, affine_of(2, (2.0, 1.0, 1.0)), shape, valid)
    result = to_grid(source, (target,) * 3)
    assert result.valid.sum() * target**3 == pytest.approx(valid.sum() * 2.0, rel=0.03)
    centre = world_of(result.affine, np.argwhere(result.valid)).mean(axis=0)
    np.testing.assert_allclose(centre, world_of(source.affine, np.argwhere(valid)).mean(axis=0), atol=0.3)


def test_a_scan_on_its_grid_comes_back_untouched():
    source = scanned(waves, affine_of(1))
    assert to_grid(source, None) is source
    assert to_grid(source, spacing_of(source.affine)) is source


def test_a_sheared_scan_is_straightened_even_at_native_spacing():
    source = scanned(waves, affine_of(1, shear=0.27))
    result = to_grid(source, None)
    assert "sheared" in result.notes
    unit = result.affine[:3, :3] / spacing_of(result.affine)
    np.testing.assert_allclose(unit.T @ unit, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(spacing_of(result.affine), spacing_of(source.affine))


def test_to_canonical_changes_no_voxel_and_no_position():
    affine = affine_of(1)[:, [2, 0, 1, 3]] @ np.diag([-1, 1, -1, 1])
    source = scanned(linear, affine, (9, 10, 11))
    source.valid[0, 0, 0] = False
    turned = to_canonical(source)
    assert np.shares_memory(turned.hu, source.hu)
    np.testing.assert_allclose(turned.hu, expected_at(linear, turned), atol=1e-3)
    (corner,) = np.argwhere(~turned.valid)
    np.testing.assert_allclose(world_of(turned.affine, corner), affine[:3, 3], atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 30, 30), (30, 2, 2), (1, 5, 5)])
@pytest.mark.parametrize("target", [0.7, 6.0])
def test_thin_scans(shape, target):
    source = scanned(lambda p: np.full(p.shape[:-1], 60.0), affine_of(3, (1, 1, 1), tilt=0), shape)
    result = to_grid(source, (target,) * 3)
    assert result.valid.any()
    assert np.abs(result.hu[result.valid] - 60.0).max() < 0.05
