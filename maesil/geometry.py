"""Where a voxel lies in the patient: the only module that converts between coordinate conventions.

An *affine* here is a float64 4x4 matrix that maps a voxel index ``[z, y, x, 1]`` to a position
``[x, y, z, 1]`` in mm in the DICOM patient system LPS (x to the Left, y to Posterior, z to Superior;
DICOM PS3.3 C.7.6.2.1.1). Index (0, 0, 0) is the *centre* of the first voxel. NIfTI speaks of ``[i, j, k]`` and
RAS instead (NIfTI-1, section "Orientation and location in space"); `from_nifti` and `to_nifti` translate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maesil.types import Spacing, Zyx

Affine = NDArray[np.float64]

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_REVERSE_AXES = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)


def from_nifti(affine_ras_ijk: NDArray[np.floating[Any]]) -> Affine:
    """Return the affine of the transposed (``k j i`` -> ``z y x``) array from a NIfTI RAS affine (4x4, mm)."""
    return np.asarray(_RAS_TO_LPS @ np.asarray(affine_ras_ijk, dtype=np.float64) @ _REVERSE_AXES)


def to_nifti(affine: Affine) -> Affine:
    """Return the NIfTI RAS affine (4x4, mm) of the array transposed from ``z y x`` to ``i j k``."""
    return np.asarray(_RAS_TO_LPS @ affine @ _REVERSE_AXES)


def from_dicom(
    position: Sequence[float], slice_step: Sequence[float], orientation: Sequence[float], pixel_spacing: Sequence[float]
) -> Affine:
    """Return the affine of a stack of DICOM slices (PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1).

    ``position`` is ImagePositionPatient of the first slice and ``slice_step`` the vector to the next one, in mm LPS;
    ``orientation`` the six ImageOrientationPatient cosines; ``pixel_spacing`` is (between rows, between columns).
    """
    affine = np.eye(4)
    affine[:3, 0] = slice_step
    affine[:3, 1] = np.asarray(orientation[3:], dtype=np.float64) * pixel_spacing[0]
    affine[:3, 2] = np.asarray(orientation[:3], dtype=np.float64) * pixel_spacing[1]
    affine[:3, 3] = position
    return affine


def straight(spacing: Spacing, origin: Sequence[float] | NDArray[np.float64]) -> Affine:
    """Return the affine of axes z, y, x that point to S, P, L: spacing (mm), and first voxel (x, y, z; mm LPS)."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing)[::-1]
    affine[:3, 3] = origin
    return affine


def spacing_of(affine: Affine) -> Spacing:
    """Return the distance between neighbouring voxels along z, y, x (mm)."""
    z, y, x = np.linalg.norm(affine[:3, :3], axis=0)
    return float(z), float(y), float(x)


def world_of(affine: Affine, index_zyx: NDArray[Any] | Sequence[float]) -> NDArray[np.float64]:
    """Return the LPS positions ``[..., 3]`` (mm) of voxel indices ``[..., 3]`` (z, y, x; may be fractional)."""
    return np.asarray(np.asarray(index_zyx, dtype=np.float64) @ affine[:3, :3].T + affine[:3, 3])


def coarser(affine: Affine, step: Zyx, first: Sequence[float] = (0.0, 0.0, 0.0)) -> Affine:
    """Return the affine of a grid of every ``step``-th voxel along z, y, x, whose first lies at an index of this one.

    The index ``first`` may be fractional: cells of 8^3 voxels have their first centre at 3.5.
    """
    coarse = affine.copy()
    coarse[:3, :3] = affine[:3, :3] * np.asarray(step, dtype=np.float64)
    coarse[:3, 3] = world_of(affine, first)
    return coarse


def turn_degrees(affine: Affine) -> float:
    """Return by how much (degrees) the axes are turned away from S, P, L of the patient; 0 for a straight scan.

    It is the largest angle between an axis of the array and the axis of the patient that it stands for.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    along = np.clip(np.diagonal(directions[::-1]), -1.0, 1.0)  # of z, y, x along S, P, L
    return float(np.degrees(np.arccos(along)).max())


def shear_mm(affine: Affine, shape: Zyx) -> float:
    """Return how far (mm) the far end of an axis of the volume strays because two axes are not at a right angle."""
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(unit.T @ unit - np.eye(3))
    extent = np.asarray(shape) * np.asarray(spacing_of(affine))
    return float((cosines * np.minimum(extent[:, None], extent[None, :])).max())


def canonical_axes(affine: Affine) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Return ``(order, flip)`` that make the axes of an array point as closely as possible to S, P, L (z, y, x).

    ``order`` is the argument of ``transpose``; ``flip`` then says which of the new axes to reverse.
    """
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    toward_zyx = unit[::-1]  # row r: how much each array axis points along world z, y, x
    order = max(permutations(range(3)), key=lambda p: sum(abs(toward_zyx[r, p[r]]) for r in range(3)))
    flip = tuple(bool(toward_zyx[r, order[r]] < 0) for r in range(3))
    return (order[0], order[1], order[2]), (flip[0], flip[1], flip[2])


def reorient(volume: NDArray[Any], affine: Affine) -> tuple[NDArray[Any], Affine]:
    """Return a view of the volume with axes pointing to S, P, L, and its affine: no voxel value is touched."""
    order, flip = canonical_axes(affine)
    reordered = volume.transpose(order)
    turned = reoriented(affine, order, flip, reordered.shape)
    return reordered[tuple(slice(None, None, -1 if f else 1) for f in flip)], turned


def reoriented(affine: Affine, order: Sequence[int], flip: Sequence[bool], shape: Sequence[int]) -> Affine:
    """Return the affine of an array whose axes came into another ``order`` and this ``shape``, and then reversed."""
    turned = affine.copy()
    turned[:3, :3] = affine[:3, list(order)]
    for axis in range(3):
        if flip[axis]:
            turned[:3, 3] += turned[:3, axis] * (shape[axis] - 1)
            turned[:3, axis] *= -1
    return turned


def orthogonal_grid(shape: Zyx, affine: Affine, spacing: Spacing) -> tuple[Zyx, Affine]:
    """Return shape and affine of the right-angled grid of the given spacing (mm) that covers the same space.

    Outer edge meets outer edge. A sheared stack (gantry tilt) keeps the directions of its slice step and of its rows;
    the grid then covers the bounding box.
    """
    directions = _right_angled(affine)
    corners = np.array([[z, y, x] for z in (0, shape[0]) for y in (0, shape[1]) for x in (0, shape[2])]) - 0.5
    along = world_of(affine, corners) @ directions  # [8, 3]: coordinates along the grid's own axes
    low, high = along.min(axis=0), along.max(axis=0)
    step = np.asarray(spacing, dtype=np.float64)
    # Half a voxel more is none more: its centre would lie on the outer face, outside by rounding.
    count = np.maximum(1, np.floor((high - low) / step + 0.5 - 1e-6)).astype(int)
    grid = np.eye(4)
    grid[:3, :3] = directions * step
    # A scan thinner than one voxel lies in the middle of it, not at its edge.
    first = np.where(count == 1, (low + high) / 2, low + step / 2)
    grid[:3, 3] = directions @ first
    return (int(count[0]), int(count[1]), int(count[2])), grid


def _right_angled(affine: Affine) -> NDArray[np.float64]:
    """Return orthonormal directions (columns z, y, x): slice step kept, row direction kept as far as it can be."""
    z = affine[:3, 0] / np.linalg.norm(affine[:3, 0])
    x = affine[:3, 2] - z * (z @ affine[:3, 2])
    x /= np.linalg.norm(x)
    y = np.cross(z, x)
    if y @ affine[:3, 1] < 0:  # a left-handed array stays left-handed
        y = -y
    return np.stack([z, y, x], axis=1)
