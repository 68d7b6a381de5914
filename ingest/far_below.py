"""Values far below air: padding at the margin that no header declares, noise and streaks, or wrapped words."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.errors import Refused

FAR_BELOW_AIR_HU = -1500
_PACKED = 0.5
"""Of noise few voxels have a neighbour as far below air; of padding nearly all have."""
_AIR_HU = -500
_JUMP_HU = 2500.0


def padding_among(hu: NDArray[np.float32], low: NDArray[np.bool_], valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which of the valid voxels far below air (``low``, ``[z, y, x]``) are padding.

    Padding hangs together with the margin of its slice, or is one number within air. What else there is, noise of air
    or streaks beside metal, stays; `Refused` with ``wrapped`` where it drops from tissue or metal as neither does.
    """
    if not _is_packed(low):
        _check_scattered(hu, low, low, valid)
        return np.zeros_like(low)
    inner = _apart_from_margin(low)
    if inner.any():
        beside_air = _check_scattered(hu, inner, low, valid)
        return low if beside_air and np.unique(hu[inner]).size == 1 else low & ~inner
    return low


def _is_packed(low: NDArray[np.bool_]) -> bool:
    return bool((low[:, :, :-1] & low[:, :, 1:]).sum() > _PACKED * low.sum())


def _check_scattered(
    hu: NDArray[np.float32], region: NDArray[np.bool_], low: NDArray[np.bool_], valid: NDArray[np.bool_]
) -> bool:
    """Return whether a region lies in air; `Refused` where its neighbours are dense and far above it."""
    jumps: list[NDArray[np.float32]] = []
    beside: list[NDArray[np.float32]] = []
    for z in np.flatnonzero(region.any(axis=(1, 2))):
        known = valid[z] & ~low[z]
        for one, other in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
            for here, there in ((one, other), (other, one)):
                pairs = region[z][here] & known[there]
                beside.append(hu[z][there][pairs])
                jumps.append(hu[z][there][pairs] - hu[z][here][pairs])
    around, jump = np.concatenate(beside), np.concatenate(jumps)
    if not around.size or np.median(around) <= _AIR_HU:
        return True
    if (typical := float(np.median(jump))) > _JUMP_HU:
        count = int(region.sum())
        text = f"{count} voxels lie {typical:.0f} HU below the tissue or metal around them"
        raise Refused("wrapped", f"{text}: values ran over the end of their words", voxels=count, below=typical)
    return False


def _apart_from_margin(low: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the voxels of a mask that do not hang together with the margin of their slice."""
    inner = np.zeros_like(low)
    for z in np.flatnonzero(low.any(axis=(1, 2))):
        if _leads_out(low[z]):
            continue
        marker = low[z].copy()
        marker[1:-1, 1:-1] = False
        images = [sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in (marker, low[z])]
        reached = sitk.BinaryReconstructionByDilation(*images, backgroundValue=0, foregroundValue=1)
        inner[z] = low[z] & (sitk.GetArrayViewFromImage(reached) == 0)
    return inner


def _leads_out(plane: NDArray[np.bool_]) -> bool:
    """Return whether every voxel of a mask sees the margin along its row or column: quickly seen, and usual."""
    seen = np.zeros_like(plane)
    for view in (np.s_[:], np.s_[:, ::-1]):
        seen[view] |= np.logical_and.accumulate(plane[view], axis=1)
    return bool((seen == plane).all())
