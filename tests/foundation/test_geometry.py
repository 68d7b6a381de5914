"""Every conversion against another implementation, and every change of grid by where its voxels lie."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from maesil.geometry import (
    canonical_axes,
    from_dicom,
    from_nifti,
    orthogonal_grid,
    reorient,
    shear_mm,
    spacing_of,
    to_nifti,
    world_of,
)

TO_RAS = np.array([-1.0, -1.0, 1.0])
quick = settings(max_examples=40, deadline=None)


@st.composite
def affines(draw, shear: float = 0.0) -> np.ndarray:
    """Any rotation (a random quaternion), handedness, spacing, origin; axes skewed by at most ``shear``."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    directions = directions + shear * rng.uniform(-1, 1, (3, 3))
    affine = np.eye(4)
    affine[:3, :3] = directions / np.linalg.norm(directions, axis=0) * rng.uniform(0.3, 6, 3)
    affine[:3, 3] = rng.uniform(-500, 500, 3)
    return affine


shapes = st.tuples(*[st.integers(1, 7)] * 3)


@quick
@given(affines(shear=0.3))
def test_nifti_round_trip(affine):
    np.testing.assert_allclose(to_nifti(from_nifti(affine)), affine, atol=1e-9)
    np.testing.assert_allclose(from_nifti(to_nifti(affine)), affine, atol=1e-9)


@quick
@given(affines(shear=0.3), shapes, st.integers(0, 2**31))
def test_from_nifti_places_voxels_where_nibabel_does(affine_ras, shape_ijk, seed):
    image = nib.Nifti1Image(np.zeros(shape_ijk, np.int16), affine_ras)
    ijk = np.random.default_rng(seed).integers(0, shape_ijk, (5, 3))
    expected_ras = nib.affines.apply_affine(image.affine, ijk)
    np.testing.assert_allclose(world_of(from_nifti(image.affine), ijk[:, ::-1]) * TO_RAS, expected_ras, atol=1e-4)


@quick
@given(affines(), st.integers(0, 2**31))
def test_from_dicom_is_the_equation_of_the_standard(affine, seed):
    """PS3.3 equation C.7.6.2.1-1: P = S + X * column spacing * column index + Y * row spacing * row index."""
    rng = np.random.default_rng(seed)
    x, y = affine[:3, 2], affine[:3, 1]
    row_cosines, column_cosines = x / np.linalg.norm(x), y / np.linalg.norm(y)
    between_rows, between_columns = rng.uniform(0.3, 2, 2)
    position, step = affine[:3, 3], affine[:3, 0]
    found = from_dicom(position, step, [*row_cosines, *column_cosines], (between_rows, between_columns))
    for k, row, column in rng.integers(0, 100, (5, 3)):
        first_of_slice = position + k * step
        expected = first_of_slice + row_cosines * between_columns * column + column_cosines * between_rows * row
        np.testing.assert_allclose(world_of(found, [k, row, column]), expected, atol=1e-9)


@quick
@given(affines(), shapes)
def test_world_of_agrees_with_simpleitk(affine, shape):
    image = sitk.Image([int(n) for n in shape[::-1]], sitk.sitkInt16)
    z, y, x = spacing_of(affine)
    image.SetSpacing((x, y, z))
    image.SetOrigin(affine[:3, 3])
    image.SetDirection((affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))[:, ::-1].ravel())
    last = np.asarray(shape) - 1
    expected = image.TransformIndexToPhysicalPoint([int(i) for i in last[::-1]])
    np.testing.assert_allclose(world_of(affine, last), expected, atol=1e-6)


@quick
@given(affines(shear=0.25), shapes)
def test_reorient_keeps_every_value_at_its_place(affine, shape):
    volume = np.arange(np.prod(shape)).reshape(shape)
    turned, new_affine = reorient(volume, affine)
    index = np.indices(shape).reshape(3, -1).T
    where = {int(value): world_of(affine, at) for value, at in zip(volume.ravel(), index, strict=True)}
    new_index = np.indices(turned.shape).reshape(3, -1).T
    expected = np.array([where[int(value)] for value in turned.ravel()])
    np.testing.assert_allclose(world_of(new_affine, new_index), expected, atol=1e-8)


@quick
@given(affines(), shapes)
def test_reorient_points_axes_to_head_back_and_left(affine, shape):
    volume = np.zeros(shape)
    turned, new_affine = reorient(volume, affine)
    assert canonical_axes(new_affine) == ((0, 1, 2), (False, False, False))
    again, same = reorient(turned, new_affine)
    np.testing.assert_array_equal(same, new_affine)
    assert again.shape == turned.shape
    assert np.linalg.det(new_affine[:3, :3]) < 0  # z, y, x -> x, y, z of a right-handed system
    assert np.shares_memory(again, volume)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SLA", "IPL", "AIL"])
def test_reorient_agrees_with_nibabel(codes):
    rng = np.random.default_rng(3)
    data = rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    base = nib.Nifti1Image(data, np.diag([-1.5, -2.0, 3.0, 1.0]))
    wanted = nib.orientations.axcodes2ornt(tuple(codes))
    turned = base.as_reoriented(nib.orientations.ornt_transform(nib.orientations.io_orientation(base.affine), wanted))
    array, affine = reorient(np.asarray(turned.dataobj).transpose(2, 1, 0), from_nifti(turned.affine))
    np.testing.assert_array_equal(array, data.transpose(2, 1, 0))
    np.testing.assert_allclose(affine, from_nifti(base.affine), atol=1e-6)


@quick
@given(affines(), st.tuples(*[st.integers(1, 60)] * 3), st.tuples(*[st.floats(0.4, 6)] * 3))
def test_orthogonal_grid_covers_the_same_box(affine, shape, spacing):
    new_shape, grid = orthogonal_grid(shape, affine, spacing)
    np.testing.assert_allclose(spacing_of(grid), spacing)
    extent, new_extent = np.multiply(shape, spacing_of(affine)), np.multiply(new_shape, spacing)
    close = np.abs(new_extent - extent) <= np.asarray(spacing) / 2 * (1 + 1e-4) + 1e-9
    assert close[np.asarray(new_shape) > 1].all()
    # Seen from the old grid, the new first face lies on the old one; a single voxel lies in the middle.
    index = np.linalg.solve(affine[:3, :3], world_of(grid, [-0.5] * 3) - affine[:3, 3])
    several = np.asarray(new_shape) > 1
    np.testing.assert_allclose(index[several], -0.5, atol=1e-6)
    middle = np.linalg.solve(affine[:3, :3], world_of(grid, (np.asarray(new_shape) - 1) / 2) - affine[:3, 3])
    np.testing.assert_allclose(middle[~several], (np.asarray(shape)[~several] - 1) / 2, atol=1e-6)
    # The axes are parallel.
    np.testing.assert_allclose(grid[:3, :3] / spacing, affine[:3, :3] / spacing_of(affine), atol=1e-9)


@quick
@given(affines(), st.tuples(*[st.integers(1, 200)] * 3))
def test_orthogonal_grid_of_the_own_spacing_is_the_own_grid(affine, shape):
    new_shape, grid = orthogonal_grid(shape, affine, spacing_of(affine))
    assert new_shape == shape
    np.testing.assert_allclose(grid, affine, atol=1e-7)


@quick
@given(affines(shear=0.25), st.tuples(*[st.integers(2, 40)] * 3), st.floats(0.5, 4))
def test_orthogonal_grid_of_a_sheared_stack_bounds_it(affine, shape, mm):
    new_shape, grid = orthogonal_grid(shape, affine, (mm, mm, mm))
    directions = grid[:3, :3] / mm
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-9)
    corners = np.array([[z, y, x] for z in (0, shape[0]) for y in (0, shape[1]) for x in (0, shape[2])]) - 0.5
    index = np.linalg.solve(grid[:3, :3], (world_of(affine, corners) - grid[:3, 3]).T).T
    assert (index.min(axis=0) >= np.where(np.asarray(new_shape) > 1, -0.5, -0.75) - 1e-6).all()
    assert (index.max(axis=0) <= np.asarray(new_shape)).all()  # half a voxel at most is left out
    assert np.sign(np.linalg.det(grid[:3, :3])) == np.sign(np.linalg.det(affine[:3, :3]))


@quick
@given(affines(), st.tuples(*[st.integers(2, 500)] * 3))
def test_right_angles_have_no_shear(affine, shape):
    assert shear_mm(affine, shape) < 1e-9


def test_shear_of_a_tilted_gantry_is_what_the_last_slice_strays():
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    tilt = np.radians(15)
    affine[:3, 0] = (0, 2 * np.sin(tilt), 2 * np.cos(tilt))
    affine[1, 1], affine[0, 2] = 0.7, 0.7
    assert shear_mm(affine, (100, 512, 512)) == pytest.approx(100 * 2 * np.sin(tilt), rel=1e-6)
