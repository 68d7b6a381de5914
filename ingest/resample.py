"""Bringing a scan to its final grid: one resampling step through the true affine, with a prefilter.

Linear interpolation, after a Gaussian on every axis that is downsampled (sigma = 0.5 * sqrt(f^2 - 1) source voxels, f
the factor): without it linear interpolation aliases and keeps twice the noise. Voxels outside the scan take no part in
any sum: numerator and weight are filtered alike and divided (normalised convolution, Knutsson and Westin 1993).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.geometry import Affine, orthogonal_grid, reorient, shear_mm, spacing_of
from maesil.ingest.limits import check_voxels
from maesil.ingest.scanned import Scanned
from maesil.types import AIR_HU, Spacing, Zyx

_SHEARED_MM = 0.1
_SAME_GRID_MM = 1e-4
_PREFILTER_ERROR = 1e-3


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
    filled = known & (_interpolate(_prefilter(scan.filled.astype(np.float32), to_source), shape, to_source) > 0)
    return replace(resampled, valid=known & ~filled, filled=filled)


def _resample(
    hu: NDArray[np.float32], known: NDArray[np.bool_], shape: Zyx, to_source: Affine
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    all_known = bool(known.all())
    above_air = hu - np.float32(AIR_HU)
    if not all_known:
        above_air[~known] = 0
    value = _interpolate(_prefilter(above_air, to_source), shape, to_source)
    if all_known and _stays_inside(to_source, shape, hu.shape):
        value += np.float32(AIR_HU)
        return value, np.ones(shape, dtype=bool)
    weight = _interpolate(_prefilter(known.astype(np.float32), to_source), shape, to_source)
    inside = weight > 0.5
    result = np.full(shape, AIR_HU, dtype=np.float32)
    result[inside] += value[inside] / weight[inside]
    return result, inside


def _stays_inside(to_source: Affine, shape: Zyx, source_shape: tuple[int, ...]) -> bool:
    corners = np.array([[z, y, x, 1] for z in (0, shape[0] - 1) for y in (0, shape[1] - 1) for x in (0, shape[2] - 1)])
    index = (corners @ to_source.T)[:, :3]
    return bool((index > -0.5).all() and (index < np.asarray(source_shape) - 0.5).all())


def _prefilter(values: NDArray[np.float32], to_source: Affine) -> sitk.Image:
    """Return the image smoothed along each axis (z, y, x) whose downsampling factor is above 1."""
    factors = np.linalg.norm(to_source[:3, :3], axis=1)
    image = sitk.GetImageFromArray(np.ascontiguousarray(values))
    variance = np.where(factors > 1, 0.25 * (factors**2 - 1), 0)[::-1]  # voxels^2; SimpleITK counts x, y, z
    if not variance.any():
        return image
    width = 2 * int(np.ceil(4 * np.sqrt(variance.max()))) + 3
    return sitk.DiscreteGaussian(image, [float(v) for v in variance], width, _PREFILTER_ERROR, False)


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
