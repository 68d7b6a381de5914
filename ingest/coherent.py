"""Do neighbouring slices belong together? Pixels tell what no header says: two passes woven into one, other numbers.

Only doubts come from here, never geometry: what looks like two scans is refused, not taken apart. The rules are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.ingest.planes import strided
from maesil.types import Planes

_LINES = 32
"""At most so many lines of voxels are looked at, along each of the two other axes."""
_FEWEST = 8
_WINDOW = (-1024.0, 2000.0)
_JUMP_HU = 300.0
_MOST = 0.9
_STRUCTURE_HU = 100.0
_ALIKE = 0.7
_OPPOSED = -0.5
_RECURRING = 0.4
_NOTICEABLE_HU = 10.0


def incoherent(hu: Planes, valid: Planes) -> Iterator[Refused]:
    """Yield why the slices of a volume ``[z, y, x]`` along one of its axes cannot be of one scan."""
    for axis in range(3):
        lines, known = _sampled(hu, axis).astype(np.float32), _sampled(valid, axis).astype(bool)
        if len(lines) >= _FEWEST:
            yield from _jumps(lines, known, axis)
            yield from _woven(lines, known, axis)


def _sampled(volume: Planes, axis: int) -> NDArray[Any]:
    """Return evenly spread lines of voxels along an axis, ``[slice, line]``."""
    steps = [max(1, n // _LINES) for n in volume.shape]
    z, y, x = (slice(None) if a == axis else slice(step // 2, None, step) for a, step in enumerate(steps))
    return np.moveaxis(strided(volume, (z, y, x)), axis, 0).reshape(volume.shape[axis], -1)


def _jumps(lines: NDArray[np.float32], known: NDArray[np.bool_], axis: int) -> Iterator[Refused]:
    """The same picture as the next slice's, but air and tissue alike some hundred HU higher: another rescale."""
    step, both = np.diff(lines, axis=0), known[:-1] & known[1:]
    most = _MOST * np.maximum(both.sum(axis=1), 2)
    up, down = ((both & (step > _JUMP_HU)).sum(axis=1) > most), ((both & (step < -_JUMP_HU)).sum(axis=1) > most)
    for z in np.flatnonzero(up | down):
        here, there = lines[z][both[z]], lines[z + 1][both[z]]
        if min(here.std(), there.std()) >= _STRUCTURE_HU and np.corrcoef(here, there)[0, 1] > _ALIKE:
            low, high = np.percentile(there - here, [10, 90])
            text = f"all voxels change by {low:.0f} to {high:.0f} HU from slice {z} to {z + 1} (axis {axis})"
            yield Refused("slice_offset", f"{text}: one of them has another rescale", axis=axis, slice=int(z) + 1)
            return


def _woven(lines: NDArray[np.float32], known: NDArray[np.bool_], axis: int) -> Iterator[Refused]:
    """Each slice differs from the mean of its neighbours, and every second one in the same way.

    Differences of independent noise correlate by -2/3 with the next ones and 1/6 with those after; real scans had -0.3
    to 0.1 and -0.4 to 0.1, two woven passes have about -1 and 1.
    """
    shown: NDArray[np.float32] = np.clip(lines, *_WINDOW)
    off = shown[1:-1] - (shown[:-2] + shown[2:]) / 2
    sure = known[1:-1] & known[:-2] & known[2:]
    next_one, one_after = _correlation(off, sure, 1), _correlation(off, sure, 2)
    size = float(np.sqrt(np.mean(np.square(off[sure])))) if sure.any() else 0.0
    if size > _NOTICEABLE_HU and next_one < _OPPOSED and one_after > _RECURRING:
        text = (
            f"every second slice (axis {axis}) differs from its neighbours alike, by {size:.0f} HU: two passes in one"
        )
        numbers = {"axis": axis, "next": next_one, "one_after": one_after, "rms": size}
        yield Refused("woven_passes", text, **numbers)


def _correlation(off: NDArray[Any], sure: NDArray[np.bool_], lag: int) -> float:
    both = sure[:-lag] & sure[lag:]
    a, b = off[:-lag][both], off[lag:][both]
    scale = float(np.sqrt(np.mean(a * a) * np.mean(b * b))) if a.size else 0.0
    return float(np.mean(a * b)) / scale if scale else 0.0
