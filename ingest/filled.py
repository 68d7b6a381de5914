"""Where nothing was scanned, though the header does not say so: what a resampler or a scanner filled with one number.

Such filling is constant, hangs together and touches the border of the volume, whatever its number and its shape. Noise
makes that of no measured region: only air and metal, where a scanner clips them, are constant too. So regions of air
stay valid whatever made them. The rules are ours.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

_SEED = 5
"""A square of so many voxels of one value, on an outer face of the volume, is where filling is looked for."""
_EDGE = 3
"""Filling is followed as far as cubes of this edge fit into it, and by two voxels more."""
_AIR_HU = (-1150.0, -900.0)
"""Constant values in this range are air: clipped by a scanner, made by a phantom, or filled in, which says the same."""
_METAL_ABOVE_HU = 1000
_BESIDE_METAL_HU = 300
_PLATEAU_HU = 6.0
_COARSE_HU = 5.0
_SAMPLES = 100_000


def filled_border(
    hu: NDArray[np.float32], valid: NDArray[np.bool_], keep: Collection[float] = ()
) -> NDArray[np.bool_] | None:
    """Return which valid voxels ``[z, y, x]`` are filling, or None if none are; values of ``keep`` never are."""
    if _step(hu) > _COARSE_HU:
        return None  # tissue itself is constant in numbers as coarse as its noise
    regions = []
    for value in _constant_on_a_face(hu, valid):
        if value in keep or _AIR_HU[0] <= value <= _AIR_HU[1]:
            continue  # constant air and what is filled with air say the same
        region = _hanging_together(valid & (hu == value))
        if region.any() and not _is_scan(value, region, hu, valid):
            regions.append(region)
    # Filling has one number; several constant regions are tissue without noise.
    return regions[0] if len(regions) == 1 and not np.array_equal(regions[0], valid) else None


def _constant_on_a_face(hu: NDArray[np.float32], valid: NDArray[np.bool_]) -> list[float]:
    """Return the values that fill a square on one of the six outer faces."""
    values: set[float] = set()
    for axis, end in product(range(3), (0, -1)):
        face, inside = np.take(hu, end, axis=axis), np.take(valid, end, axis=axis)
        lowest, highest = _over_squares(face, np.minimum), _over_squares(face, np.maximum)
        whole = _over_squares(inside, np.logical_and) & (lowest == highest)
        values.update(map(float, np.unique(lowest[whole])))
    return sorted(values)


def _over_squares(face: NDArray[Any], operation: np.ufunc) -> NDArray[Any]:
    """Combine the voxels of each square of a face, or of as much as there is of one."""
    for axis in range(2):
        moved = np.moveaxis(face, axis, 0)
        count = len(moved) - min(_SEED, len(moved)) + 1
        face = np.moveaxis(reduce(operation, (moved[n : n + count] for n in range(len(moved) - count + 1))), 0, axis)
    return face


def _hanging_together(same: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the solid parts of a mask that touch the border, with their thin ends; beyond the border all goes on."""
    solid = np.pad(same, _EDGE - 1, mode="edge")
    for operation in (np.logical_and, np.logical_or):
        for axis in range(3):
            solid = _over_three(solid, operation, axis)
    outer = solid.copy()
    outer[1:-1, 1:-1, 1:-1] = False
    marker, mask = (sitk.GetImageFromArray(m.view(np.uint8)) for m in (outer, solid))
    reached = sitk.BinaryReconstructionByDilation(marker, mask, backgroundValue=0, foregroundValue=1)
    region = np.asarray(sitk.GetArrayViewFromImage(reached)).view(bool).copy()
    for _ in range(_EDGE - 1):
        region = _grown(region) & same
    return region


def _over_three(mask: NDArray[np.bool_], operation: np.ufunc, axis: int) -> NDArray[np.bool_]:
    """Combine each voxel with its two neighbours along an axis, which loses its first and last."""
    moved = np.moveaxis(mask, axis, 0)
    result = operation(operation(moved[:-2], moved[1:-1]), moved[2:])
    return np.moveaxis(result, 0, axis)


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    for axis in range(3):
        mask = _over_three(np.pad(mask, [(int(a == axis),) * 2 for a in range(3)]), np.logical_or, axis)
    return mask


def _is_scan(value: float, region: NDArray[np.bool_], hu: NDArray[np.float32], valid: NDArray[np.bool_]) -> bool:
    """Whether a constant region was measured: metal that a scanner clipped, or a plateau of rounded numbers.

    Beside clipped metal lies what is dense, beside a plateau what is hardly different.
    """
    beside = hu[_grown(region) & ~region & valid]
    if not beside.size:
        return False
    if value > _METAL_ABOVE_HU and float(np.median(beside)) > _BESIDE_METAL_HU:
        return True
    return float(np.median(np.abs(beside - value))) <= _PLATEAU_HU


def _step(hu: NDArray[np.float32]) -> float:
    """Return the smallest distance between two values of a volume (HU), as far as a sample of it tells."""
    values = np.unique(hu.ravel()[:: max(1, hu.size // _SAMPLES)])
    return float(np.diff(values).min()) if len(values) > 1 else 0.0
