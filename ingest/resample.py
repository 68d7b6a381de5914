"""Bringing a scan to its final grid: one resampling step through the true affine, with a prefilter.

Linear interpolation, after a Gaussian on every axis that is downsampled (sigma = 0.5 * sqrt(f^2 - 1) source voxels, f
the factor): without it linear interpolation aliases and keeps twice the noise. Voxels outside the scan take no part in
any sum: numerator and weight are filtered alike and divided (normalised convolution, Knutsson and Westin 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.geometry import Affine, canonical_axes, orthogonal_grid, reoriented, shear_mm, spacing_of
from maesil.ingest.limits import check_voxels
from maesil.ingest.planes import all_of, slabs, turned
from maesil.ingest.scanned import Scanned
from maesil.ingest.separable import apply_in_slabs, axis_maps, gaussian, gaussian_width, share_axes
from maesil.types import AIR_HU, Planes, Spacing, Zyx

_SHEARED_MM = 0.1
_SAME_GRID_MM = 1e-4
_OBLIQUE_SLAB = 64

_Sample = Callable[[Callable[[int], NDArray[np.float32]]], Iterator[NDArray[np.float32]]]
"""From a source volume, given slice by slice, to slabs of the target grid."""


@dataclass(frozen=True)
class Slab:
    """Some slices of a scan on its final grid."""

    hu: NDArray[np.float32]
    known: NDArray[np.bool_]
    """Where HU mean something: measured or interpolated."""
    valid: NDArray[np.bool_]
    """Measured."""


@dataclass(frozen=True)
class OnGrid:
    """A scan on its final grid, made slab by slab."""

    shape: Zyx
    affine: Affine
    notes: tuple[str, ...]
    slabs: Callable[[], Iterator[Slab]]


def to_canonical(scan: Scanned) -> Scanned:
    """Return the scan with its axes pointing to S, P, L (views; no voxel is changed)."""
    order, flip = canonical_axes(scan.affine)
    shape: list[int] = [scan.shape[axis] for axis in order]
    hu, valid = turned(scan.hu, order, flip), turned(scan.valid, order, flip)
    filled = None if scan.filled is None else turned(scan.filled, order, flip)
    affine = reoriented(scan.affine, order, flip, shape)
    return replace(scan, hu=hu, valid=valid, affine=affine, filled=filled)


def to_grid(scan: Scanned, spacing: Spacing | None) -> Scanned:
    """Return a canonical scan on a right-angled grid of the given spacing (mm) as a whole, as `on_grid`."""
    final = on_grid(scan, spacing)
    if final.affine is scan.affine:
        return scan
    parts = list(final.slabs())
    hu, known, valid = (np.concatenate([getattr(part, name) for part in parts]) for name in ("hu", "known", "valid"))
    filled = None if scan.filled is None else known & ~valid
    return replace(scan, hu=hu, valid=valid, affine=final.affine, notes=final.notes, filled=filled)


def on_grid(scan: Scanned, spacing: Spacing | None) -> OnGrid:
    """Return how a canonical scan gets on a right-angled grid of the given spacing (mm); None keeps the scan's own.

    A scan already on such a grid stays as it is. A sheared one (gantry tilt) is always resampled, since its voxels are
    not cuboids.
    """
    own = spacing_of(scan.affine)
    sheared = shear_mm(scan.affine, scan.shape) > _SHEARED_MM
    target = own if spacing is None else spacing
    if not sheared and np.allclose(own, target, rtol=0, atol=_SAME_GRID_MM):
        return OnGrid(scan.shape, scan.affine, scan.notes, lambda: _as_it_is(scan))
    shape, affine = orthogonal_grid(scan.shape, scan.affine, target)
    check_voxels(shape)
    to_source = np.linalg.inv(scan.affine) @ affine
    notes = (*scan.notes, "sheared") if sheared else scan.notes
    return OnGrid(shape, affine, notes, lambda: _resampled(scan, shape, to_source))


def _as_it_is(scan: Scanned) -> Iterator[Slab]:
    known = scan.known
    for slab in slabs(len(scan.hu)):
        yield Slab(scan.hu[slab], known[slab], scan.valid[slab])


def _resampled(scan: Scanned, shape: Zyx, to_source: Affine) -> Iterator[Slab]:
    sample = _sampler(scan.shape, shape, to_source)
    hu, known = scan.hu, scan.known
    if scan.filled is None:
        filled: Iterator[NDArray[np.float32] | None] = repeat(None)
    else:
        filled = sample(lambda z: scan.filled[z].astype(np.float32))  # type: ignore[index]
    if all_of(known) and _stays_inside(to_source, shape, hu.shape):
        parts = _all_known(sample(hu.__getitem__))
    else:
        parts = _weighed(sample, hu, known)
    for (part, inside), between in zip(parts, filled, strict=False):
        # A voxel to which an interpolated one contributes is not measured.
        yield Slab(part, inside, inside if between is None else inside & ~(between > 0))


def _all_known(values: Iterator[NDArray[np.float32]]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    return ((value, np.ones(value.shape, dtype=bool)) for value in values)  # every weight is 1


def _weighed(sample: _Sample, hu: Planes, known: Planes) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Yield slabs of HU and where they are known, from the known voxels alone."""
    values = sample(lambda z: np.where(known[z], hu[z] - np.float32(AIR_HU), np.float32(0)))
    weights = sample(lambda z: known[z].astype(np.float32))
    for value, weight in zip(values, weights, strict=True):
        inside = weight > 0.5
        result = np.full(inside.shape, AIR_HU, dtype=np.float32)
        result[inside] += value[inside] / weight[inside]
        yield result, inside


def _stays_inside(to_source: Affine, shape: Zyx, source_shape: tuple[int, ...]) -> bool:
    corners = np.array([[z, y, x, 1] for z in (0, shape[0] - 1) for y in (0, shape[1] - 1) for x in (0, shape[2] - 1)])
    index = (corners @ to_source.T)[:, :3]
    return bool((index > -0.5).all() and (index < np.asarray(source_shape) - 0.5).all())


def _sampler(source_shape: Zyx, shape: Zyx, to_source: Affine) -> _Sample:
    """Return what smooths a volume where its axes are downsampled and then samples it on the target grid, in slabs."""
    factors = np.linalg.norm(to_source[:3, :3], axis=1)
    variance = np.where(factors > 1, 0.25 * (factors**2 - 1), 0)  # voxels^2, z y x
    if share_axes(to_source):
        maps = axis_maps(source_shape, shape, to_source, variance)
        return lambda slice_of: apply_in_slabs(maps, slice_of)
    return lambda slice_of: _interpolated(slice_of, source_shape, shape, to_source, variance)


def _interpolated(
    slice_of: Callable[[int], NDArray[np.float32]],
    source_shape: Zyx,
    shape: Zyx,
    to_source: Affine,
    variance: NDArray[np.float64],
) -> Iterator[NDArray[np.float32]]:
    """Yield slabs of a volume on a target grid that does not share its axes, each from the source slices it needs."""
    margin = 1 + (gaussian_width([float(v) for v in variance]) if variance.any() else 0)
    for slab in slabs(shape[0], _OBLIQUE_SLAB):
        size: Zyx = (slab.stop - slab.start, shape[1], shape[2])
        ends = [[z, y, x, 1] for z in (slab.start, slab.stop - 1) for y in (0, shape[1] - 1) for x in (0, shape[2] - 1)]
        needed = np.asarray(ends) @ to_source[0]
        first = max(0, int(np.floor(needed.min())) - margin)
        last = min(source_shape[0] - 1, int(np.ceil(needed.max())) + margin)
        if first > last:
            yield np.zeros(size, dtype=np.float32)
            continue
        moved = to_source.copy()
        moved[:3, 3] += to_source[:3, 0] * slab.start - np.array([first, 0, 0])
        image = _smooth(np.stack([slice_of(z) for z in range(first, last + 1)]), variance)
        yield _interpolate(image, size, moved)


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
