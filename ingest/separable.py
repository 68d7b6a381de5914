"""Smoothing and interpolation along each axis by itself, as matrix products: far faster than in three dimensions.

Where source and target grid share their axes, the Gaussian and the linear interpolation of `maesil.ingest.resample` are
one linear map an axis. SimpleITK is asked what it does to unit vectors, so that both ways mean the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.geometry import Affine
from maesil.types import Zyx

_SAME_AXES = 1e-9
_BLOCK = 32
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
    units = sitk.GetImageFromArray(np.eye(source_size, dtype=np.float32))  # one unit vector a row, along x
    if variance:
        units = gaussian(units, [float(variance), 0.0])
    transform = sitk.AffineTransform([float(step), 0, 0, 1], [float(start), 0])
    sampled = sitk.Resample(
        units, [size, source_size], transform, sitk.sitkLinear, [0.0] * 2, [1.0] * 2, [1, 0, 0, 1], 0.0
    )
    return np.ascontiguousarray(sitk.GetArrayFromImage(sampled).T)


def gaussian(image: sitk.Image, variance: list[float]) -> sitk.Image:
    """Return an image after a Gaussian of this variance (voxels^2; x first, as SimpleITK counts)."""
    width = 2 * int(np.ceil(4 * np.sqrt(max(variance)))) + 3
    return sitk.DiscreteGaussian(image, variance, width, _GAUSSIAN_ERROR, False)


def apply_maps(maps: AxisMaps, values: NDArray[Any]) -> NDArray[np.float32]:
    """Return a volume ``[z, y, x]`` of any real type on the target grid."""
    along_z, along_y, along_x = maps
    planes = np.empty((len(values), len(along_y), len(along_x)), dtype=np.float32)
    narrow = np.empty((values.shape[1], len(along_x)), dtype=np.float32)
    blocks_y, blocks_x = _blocks(along_y), _blocks(along_x)
    for plane, target in zip(values, planes, strict=True):
        for rows, band in blocks_x:
            np.matmul(plane[:, band].astype(np.float32, copy=False), along_x[rows, band].T, out=narrow[:, rows])
        for rows, band in blocks_y:
            np.matmul(along_y[rows, band], narrow[band], out=target[rows])
    result = np.empty((len(along_z), len(along_y), len(along_x)), dtype=np.float32)
    for rows, band in _blocks(along_z):
        np.matmul(along_z[rows, band], _flat(planes[band]), out=_flat(result[rows]))
    return result


def _flat(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    return planes.reshape(len(planes), -1)


def _blocks(matrix: NDArray[np.float32]) -> list[tuple[slice, slice]]:
    """Return (rows, the columns that hold all they need) for blocks of rows, so that products skip the zeros."""
    blocks = []
    for start in range(0, len(matrix), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(matrix)))
        (used,) = np.nonzero(matrix[rows].any(axis=0))
        blocks.append((rows, slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1)))
    return blocks
