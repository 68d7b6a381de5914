"""Bringing a scan to its final grid: one resampling step through the true affine, with a prefilter.

Linear interpolation, after a Gaussian on every axis that is downsampled (sigma = 0.5 * sqrt(f^2 - 1) source voxels, f
the factor): without it linear interpolation aliases and keeps twice the noise. Voxels outside the scan take no part in
any sum: numerator and weight are filtered alike and divided (normalised convolution, Knutsson and Westin 1993).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.geometry import Affine, orthogonal_grid, reorient, shear_mm, spacing_of
from maesil.ingest.limits import check_voxels
from maesil.ingest.scanned import Scanned
from maesil.ingest.separable import apply_maps, axis_maps, gaussian, share_axes
from maesil.types import AIR_HU, Spacing, Zyx

_SHEARED_MM = 0.1
_SAME_GRID_MM = 1e-4


def to_canonical(scan: Scanned) -> Scanned:
    """Return the scan with its axes pointing to S, P, L (views; no voxel is changed)."""
    hu, affine = reorient(scan.hu, scan.affine)
    valid, _ = reorient(scan.valid, scan.affine)
    filled = None if scan.filled is None else reorient(scan.filled, scan.affine)[0]
    return replace(scan, hu=hu, valid=valid, affine=affine, filled=filled)


def to_grid(scan: Scanned, spacing: Spacing | None) -> Scanned:
    """Return a canonical scan on a right-angled grid of the given spacing (mm); None keeps the scan's own.

    A scan already on such a grid comes back as it is. A sheared one (gantry tilt) is always resampled, since its voxels
    are not cuboids.
    """
    own = spacing_of(scan.affine)
    sheared = shear_mm(scan.affine, scan.shape) > _SHEARED_MM
    target = own if spacing is None else spacing
    if not sheared and np.allclose(own, target, rtol=0, atol=_SAME_GRID_MM):
        return scan
    shape, affine = orthogonal_grid(scan.shape, scan.affine, target)
    check_voxels(shape)
    to_source = np.linalg.inv(scan.affine) @ affine
    hu, known = _resample(scan.hu, scan.known, shape, to_source)
    notes = (*scan.notes, "sheared") if sheared else scan.notes
    resampled = replace(scan, hu=hu, valid=known, affine=affine, notes=tuple(notes), filled=None)
    if scan.filled is None:
        return resampled
    # A voxel to which an interpolated one contributes is not measured.
    filled = known & (_sampler(scan.shape, shape, to_source)(scan.filled.astype(np.float32)) > 0)
    return replace(resampled, valid=known & ~filled, filled=filled)


def _resample(
    hu: NDArray[np.float32], known: NDArray[np.bool_], shape: Zyx, to_source: Affine
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    sample = _sampler(hu.shape, shape, to_source)
    if known.all() and _stays_inside(to_source, shape, hu.shape):
        return sample(hu), np.ones(shape, dtype=bool)  # every weight is 1
    value, weight = sample(np.where(known, hu - np.float32(AIR_HU), np.float32(0))), sample(known.astype(np.float32))
    inside = weight > 0.5
    result = np.full(shape, AIR_HU, dtype=np.float32)
    result[inside] += value[inside] / weight[inside]
    return result, inside


def _stays_inside(to_source: Affine, shape: Zyx, source_shape: tuple[int, ...]) -> bool:
    corners = np.array([[z, y, x, 1] for z in (0, shape[0] - 1) for y in (0, shape[1] - 1) for x in (0, shape[2] - 1)])
    index = (corners @ to_source.T)[:, :3]
    return bool((index > -0.5).all() and (index < np.asarray(source_shape) - 0.5).all())


def _sampler(source_shape: Zyx, shape: Zyx, to_source: Affine) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return what smooths a volume where its axes are downsampled and then samples it on the target grid."""
    factors = np.linalg.norm(to_source[:3, :3], axis=1)
    variance = np.where(factors > 1, 0.25 * (factors**2 - 1), 0)  # voxels^2, z y x
    if share_axes(to_source):
        maps = axis_maps(source_shape, shape, to_source, variance)
        return lambda values: apply_maps(maps, values)
    return lambda values: _interpolate(_smooth(values, variance), shape, to_source)


def _smooth(values: NDArray[np.float32], variance: NDArray[np.float64]) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(values))
    return gaussian(image, [float(v) for v in variance[::-1]]) if variance.any() else image


def _interpolate(image: sitk.Image, shape: Zyx, to_source: Affine) -> NDArray[np.float32]:
    """Sample linearly in index space, which knows no restriction to right angles; 0 beyond the outer voxel faces."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(to_source[:3, :3][::-1, ::-1].ravel().tolist())
    transform.SetTranslation(to_source[:3, 3][::-1].tolist())
    size = [int(n) for n in shape[::-1]]
    identity = np.eye(3).ravel().tolist()
    sampled = sitk.Resample(
        image, size, transform, sitk.sitkLinear, [0.0] * 3, [1.0] * 3, identity, 0.0, sitk.sitkFloat32
    )
    return np.asarray(sitk.GetArrayFromImage(sampled))
