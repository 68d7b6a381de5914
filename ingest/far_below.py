"""Values far below air: padding at the margin that no header declares, noise and streaks, or wrapped words."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.ingest.planes import any_of, count, different_values, each
from maesil.text import counted
from maesil.types import Planes

FAR_BELOW_AIR_HU = -1500
_PACKED = 0.5
"""Of noise few voxels have a neighbour as far below air; of padding nearly all have."""
_AIR_HU = -500
_JUMP_HU = 2500.0


def padding_among(hu: Planes, low: Planes, valid: Planes) -> Planes | None:
    """Return which of the valid voxels far below air (``low``, ``[z, y, x]``) are padding; None if none are.

    Padding hangs together with the margin of its slice, or is one number within air. What else there is, noise of air
    or streaks beside metal, stays. `Refused` with ``wrapped`` where values fall further below the tissue or metal
    around than noise and streaks do.
    """
    if not _is_packed(low):
        _check_scattered(hu, low, low, valid)
        return None
    inner = each(_apart_from_margin, low)
    if any_of(inner):
        beside_air = _check_scattered(hu, inner, low, valid)
        if not beside_air or different_values(hu, inner, 1) > 1:
            low = each(lambda all_low, apart: all_low & ~apart, low, inner)
    return low if any_of(low) else None


def _is_packed(low: Planes) -> bool:
    pairs = sum(int(np.count_nonzero(plane[:, :-1] & plane[:, 1:])) for plane in low)
    return pairs > _PACKED * count(low)


def _check_scattered(hu: Planes, region: Planes, low: Planes, valid: Planes) -> bool:
    """Return whether a region lies in air; `Refused` where its neighbours are dense and far above it."""
    jumps: list[NDArray[np.float32]] = []
    beside: list[NDArray[np.float32]] = []
    for plane, apart, below, inside in zip(hu, region, low, valid, strict=True):
        if not apart.any():
            continue
        known = inside & ~below
        for one, other in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
            for here, there in ((one, other), (other, one)):
                pairs = apart[here] & known[there]
                beside.append(plane[there][pairs])
                jumps.append(plane[there][pairs] - plane[here][pairs])
    around, jump = np.concatenate(beside), np.concatenate(jumps)
    if not around.size or np.median(around) <= _AIR_HU:
        return True
    if (typical := float(np.median(jump))) > _JUMP_HU:
        voxels = count(region)
        text = f"{counted(voxels, 'voxel')}, {typical:.0f} HU below the tissue or metal around"
        raise Refused("wrapped", f"{text}: values ran over the end of their words", voxels=voxels, below=typical)
    return False


def _apart_from_margin(low: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the voxels of the mask of one slice that do not hang together with its margin."""
    if not low.any() or _leads_out(low):
        return np.zeros_like(low)
    marker = low.copy()
    marker[1:-1, 1:-1] = False
    seed, whole = (sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in (marker, low))
    reached = sitk.BinaryReconstructionByDilation(seed, whole, backgroundValue=0, foregroundValue=1)
    return np.asarray(low & (sitk.GetArrayViewFromImage(reached) == 0))


def _leads_out(plane: NDArray[np.bool_]) -> bool:
    """Return whether every voxel of a mask sees the margin along its row or column: quickly seen, and usual."""
    seen = np.zeros_like(plane)
    for view in (np.s_[:], np.s_[:, ::-1]):
        seen[view] |= np.logical_and.accumulate(plane[view], axis=1)
    return bool((seen == plane).all())
