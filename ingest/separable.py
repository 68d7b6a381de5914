"""Smoothing and interpolation along each axis by itself, as matrix products: far faster than in three dimensions.

Where source and target grid share their axes, the Gaussian and the linear interpolation of `maesil.ingest.resample` are
one linear map an axis. SimpleITK is asked what it does to unit vectors, so that both ways mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.geometry import Affine
from maesil.ingest.planes import SLAB
from maesil.types import Planes, Zyx

_SAME_AXES = 1e-9
_GAUSSIAN_ERROR = 1e-3

AxisMaps = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""For z, y, x: a matrix ``[voxels of the target, voxels of the source]``, zero away from a band."""


def share_axes(to_source: Affine) -> bool:
    """Return whether a target index along one axis moves along the same axis of the source alone."""
    matrix = to_source[:3, :3]
    return bool(np.abs(matrix - np.diag(np.diag(matrix))).max() < _SAME_AXES)


def axis_maps(source_shape: Zyx, shape: Zyx, to_source: Affine, variance: NDArray[np.float64]) -> AxisMaps:
    """Return what smoothing by ``variance`` (voxels^2 of the source) and then interpolating does along z, y and x."""
    z, y, x = (
        _axis_map(shape[axis], source_shape[axis], to_source[axis, axis], to_source[axis, 3], variance[axis])
        for axis in range(3)
    )
    return z, y, x


def _axis_map(size: int, source_size: int, step: float, start: float, variance: float) -> NDArray[np.float32]:
    units = sitk.GetImageFromArray(np.eye(source_size, dtype=np.float32))  # one unit vector per row, along x
    if variance:
        units = gaussian(units, [float(variance), 0.0])
    transform = sitk.AffineTransform([float(step), 0, 0, 1], [float(start), 0])
    sampled = sitk.Resample(
        units, [size, source_size], transform, sitk.sitkLinear, [0.0] * 2, [1.0] * 2, [1, 0, 0, 1], 0.0
    )
    return np.ascontiguousarray(sitk.GetArrayFromImage(sampled).T)


def gaussian(image: sitk.Image, variance: list[float]) -> sitk.Image:
    """Return an image after a Gaussian of this variance (voxels^2; x first, as SimpleITK counts)."""
    return sitk.DiscreteGaussian(image, variance, gaussian_width(variance), _GAUSSIAN_ERROR, False)


def gaussian_width(variance: list[float]) -> int:
    """Return the most voxels along an axis that `gaussian` sums up."""
    return 2 * int(np.ceil(4 * np.sqrt(max(variance)))) + 3


def apply_maps(maps: AxisMaps, values: Planes) -> NDArray[np.float32]:
    """Return a volume ``[z, y, x]`` of any real type on the target grid."""
    return np.concatenate(list(apply_in_slabs(maps, values.__getitem__)))


def apply_in_slabs(maps: AxisMaps, slice_of: Callable[[int], NDArray[Any]]) -> Iterator[NDArray[np.float32]]:
    """Yield the slabs of `SLAB` slices of a volume on the target grid, given the source slice by slice.

    No more of the source is held than what a slab needs.
    """
    along_z, along_y, along_x = maps
    held, first = np.empty((0, len(along_y), len(along_x)), dtype=np.float32), 0
    in_plane = _InPlane(along_y, along_x)
    for rows, band in _blocks(along_z):
        kept = held[band.start - first : band.stop - first] if band.start >= first else held[:0]
        more = range(band.start + len(kept), band.stop)
        held, first = np.empty((len(kept) + len(more), *held.shape[1:]), dtype=np.float32), band.start
        held[: len(kept)] = kept
        for z, target in zip(more, held[len(kept) :], strict=True):
            in_plane.apply(slice_of(z), target)
        result = np.empty((rows.stop - rows.start, *held.shape[1:]), dtype=np.float32)
        np.matmul(along_z[rows, band], _flat(held), out=_flat(result))
        yield result


class _InPlane:
    """What happens to a slice along y and x."""

    def __init__(self, along_y: NDArray[np.float32], along_x: NDArray[np.float32]) -> None:
        self._along_y, self._along_x = along_y, along_x
        self._blocks_y, self._blocks_x = _blocks(along_y), _blocks(along_x)
        self._narrow = np.empty((along_y.shape[1], len(along_x)), dtype=np.float32)

    def apply(self, plane: NDArray[Any], target: NDArray[np.float32]) -> None:
        """Write a slice on the target grid into ``target``."""
        for rows, band in self._blocks_x:
            values = plane[:, band].astype(np.float32, copy=False)
            np.matmul(values, self._along_x[rows, band].T, out=self._narrow[:, rows])
        for rows, band in self._blocks_y:
            np.matmul(self._along_y[rows, band], self._narrow[band], out=target[rows])


def _flat(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    return planes.reshape(len(planes), -1)


def _blocks(matrix: NDArray[np.float32]) -> list[tuple[slice, slice]]:
    """Return (rows, the columns that hold all they need) for blocks of rows, so that products skip the zeros."""
    blocks = []
    for start in range(0, len(matrix), SLAB):
        rows = slice(start, min(start + SLAB, len(matrix)))
        (used,) = np.nonzero(matrix[rows].any(axis=0))
        blocks.append((rows, slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1)))
    return blocks
