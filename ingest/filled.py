"""Where nothing was scanned, though the header does not say so: what a resampler or a scanner filled with one number.

Such filling is constant, hangs together and touches the border of the volume, whatever its number and its shape. Noise
makes that of no measured region: only air and metal, where a scanner clips them, are constant too. So regions of air
stay valid whatever made them. The rules are ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial, reduce
from itertools import product
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.ingest.planes import any_of, count, each, every, face, like, slabs
from maesil.types import Planes

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


def filled_border(hu: Planes, valid: Planes, keep: Collection[float] = ()) -> Planes | None:
    """Return which valid voxels ``[z, y, x]`` are filling, or None if none are; values of ``keep`` never are."""
    if _step(hu) > _COARSE_HU:
        return None  # tissue itself is constant in numbers as coarse as its noise
    regions = []
    for value in _constant_on_a_face(hu, valid):
        if value in keep or _AIR_HU[0] <= value <= _AIR_HU[1]:
            continue  # constant air and what is filled with air say the same
        region = hanging_together(each(partial(_with_value, value), hu, valid))
        if any_of(region) and not _is_scan(value, region, hu, valid):
            regions.append(region)
    # Filling has one number; several constant regions are tissue without noise.
    if len(regions) != 1 or count(regions[0]) == count(valid):
        return None
    return regions[0]


def _with_value(value: float, hu: NDArray[np.float32], inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(inside & (hu == value))


def _constant_on_a_face(hu: Planes, valid: Planes) -> list[float]:
    """Return the values that fill a square on one of the six outer faces."""
    values: set[float] = set()
    for axis, end in product(range(3), (0, -1)):
        outer, inside = face(hu, axis, end), face(valid, axis, end)
        lowest, highest = _over_squares(outer, np.minimum), _over_squares(outer, np.maximum)
        whole = _over_squares(inside, np.logical_and) & (lowest == highest)
        values.update(map(float, np.unique(lowest[whole])))
    return sorted(values)


def _over_squares(outer: NDArray[Any], operation: np.ufunc) -> NDArray[Any]:
    """Combine the voxels of each square of a face, or of as much as there is of one."""
    for axis in range(2):
        moved = np.moveaxis(outer, axis, 0)
        places = len(moved) - min(_SEED, len(moved)) + 1
        outer = np.moveaxis(reduce(operation, (moved[n : n + places] for n in range(len(moved) - places + 1))), 0, axis)
    return outer


def hanging_together(same: Planes) -> Planes:
    """Return the solid parts of a mask that touch the border, with their thin ends; beyond the border all goes on.

    In slabs, so that it takes no more memory where the mask is long.
    """
    solid = like(same, bool)
    for slab in slabs(len(same)):
        solid[slab] = _solid(_with_neighbours(same, slab, _EDGE - 1, "edge"))
    region = _reached(solid)
    for _ in range(_EDGE - 1):
        grown = like(same, bool)
        for slab in slabs(len(same)):
            grown[slab] = _grown(_with_neighbours(region, slab, 1, "constant"))[1:-1] & same[slab]
        region = grown
    return region


def _with_neighbours(mask: Planes, slab: slice, more: int, beyond: Literal["edge", "constant"]) -> NDArray[np.bool_]:
    """Return a slab with so many slices more at both ends; what lies beyond the volume as `numpy.pad` says."""
    start, stop = slab.start - more, slab.stop + more
    there = mask[max(0, start) : min(len(mask), stop)]
    return np.pad(there, [(max(0, -start), max(0, stop - len(mask))), (0, 0), (0, 0)], mode=beyond)


def _solid(same: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where cubes of three voxels fit into a mask; its outermost two slices are left off."""
    edges = [(0, 0), (_EDGE - 1, _EDGE - 1), (_EDGE - 1, _EDGE - 1)]
    solid = np.pad(same, edges, mode="edge")
    for operation in (np.logical_and, np.logical_or):
        for axis in range(3):
            solid = _over_three(solid, operation, axis)
    return solid


def _reached(solid: Planes) -> Planes:
    """Return what hangs together with the outer faces of a mask: forth and back through its slabs until all is found.

    What was reached in a slab is where the next one begins.
    """
    found, parts = like(solid, bool), list(slabs(len(solid)))
    for slab in parts:
        found[slab] = _outer(solid, slab)
    todo = [*parts, *reversed(parts[:-1])]
    while todo:
        for slab in todo:
            found[slab] = _reconstructed(_begun(found, solid, slab), solid[slab])
        todo = [slab for slab in parts if not np.array_equal(_begun(found, solid, slab), found[slab])]
    return found


def _outer(solid: Planes, slab: slice) -> NDArray[np.bool_]:
    """Return the voxels of a slab of a mask that lie on the outer faces of the volume."""
    outer = np.array(solid[slab])
    first, last = slab.start == 0, slab.stop == len(solid)
    outer[int(first) : len(outer) - int(last), 1:-1, 1:-1] = False
    return outer


def _begun(found: Planes, solid: Planes, slab: slice) -> NDArray[np.bool_]:
    """Return what was found in a slab of a mask, and what touches that of the slabs beside it."""
    begun = np.array(found[slab])
    if slab.start:
        begun[0] |= found[slab.start - 1]
    if slab.stop < len(found):
        begun[-1] |= found[slab.stop]
    return np.asarray(begun & solid[slab])


def _reconstructed(marker: NDArray[np.bool_], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return what of a mask hangs together with a marker."""
    seed, whole = (sitk.GetImageFromArray(m.view(np.uint8)) for m in (marker, mask))
    reached = sitk.BinaryReconstructionByDilation(seed, whole, backgroundValue=0, foregroundValue=1)
    return np.asarray(sitk.GetArrayFromImage(reached)).view(bool)


def _over_three(mask: NDArray[np.bool_], operation: np.ufunc, axis: int) -> NDArray[np.bool_]:
    """Combine each voxel with its two neighbours along an axis, which loses its first and last."""
    moved = np.moveaxis(mask, axis, 0)
    result = operation(operation(moved[:-2], moved[1:-1]), moved[2:])
    return np.moveaxis(result, 0, axis)


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    for axis in range(3):
        mask = _over_three(np.pad(mask, [(int(a == axis),) * 2 for a in range(3)]), np.logical_or, axis)
    return mask


def _is_scan(value: float, region: Planes, hu: Planes, valid: Planes) -> bool:
    """Whether a constant region was measured: metal that a scanner clipped, or a plateau of rounded numbers.

    Beside clipped metal lies what is dense, beside a plateau what is hardly different.
    """
    around = []
    for slab in slabs(len(region)):
        grown = _grown(_with_neighbours(region, slab, 1, "constant"))[1:-1]
        around.append(hu[slab][grown & ~region[slab] & valid[slab]])
    beside = np.concatenate(around)
    if not beside.size:
        return False
    if value > _METAL_ABOVE_HU and float(np.median(beside)) > _BESIDE_METAL_HU:
        return True
    return float(np.median(np.abs(beside - value))) <= _PLATEAU_HU


def _step(hu: Planes) -> float:
    """Return the smallest distance between two values of a volume (HU), as far as a sample of it tells."""
    values = np.unique(np.concatenate(list(every(hu, max(1, math.prod(hu.shape) // _SAMPLES)))))
    return float(np.diff(values).min()) if len(values) > 1 else 0.0
