"""Where slices lie, before any pixel is read: how many places there are, and stacks that lie side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maesil.ingest.header import InstanceHeader
from maesil.ingest.passes import DRIFT_MM, MIN_SLICES, SAME_POSITION_MM, Pass, along, unit

_INSTANTS = (
    "AcquisitionNumber", "TemporalPositionIndex", "TemporalPositionIdentifier", "AcquisitionDateTime",
    "AcquisitionTime", "FrameAcquisitionDateTime", "TriggerTime",
)  # fmt: skip
_NEARLY_ALL = 0.8


def place_numbers(part: Sequence[InstanceHeader]) -> NDArray[np.int64]:
    """Return for each slice the number of its place along the normal, counted from the lowest."""
    places = along(part)
    order = np.argsort(places, kind="stable")
    numbers = np.empty(len(part), dtype=np.int64)
    numbers[order] = np.cumsum(np.diff(places[order], prepend=places[order[:1]]) > SAME_POSITION_MM)
    return numbers


def is_time_series(part: Sequence[InstanceHeader]) -> bool:
    """Return whether a few places were looked at over and over (bolus tracking, perfusion): no volume, no damage.

    Where there is one place only, a writer may have given all slices the same position: the header must tell instants
    apart and must not speak of several places.
    """
    places = int(place_numbers(part).max()) + 1
    if places >= MIN_SLICES or len(part) < 2 * places:
        return False
    if places > 1:
        return True
    instants = max(len({header.said(name) for header in part}) for name in _INSTANTS)
    return instants >= _NEARLY_ALL * len(part) and len({header.slice_location for header in part}) == 1


def side_by_side(part: Sequence[InstanceHeader]) -> list[Pass]:
    """Return stacks that share their places along the normal and lie at different places in the plane; else nothing.

    Two targeted reconstructions of the same slices (left and right) are told apart by their positions alone. From place
    to place each slice belongs to the stack whose last slice lies closest in the plane.
    """
    in_plane, numbers = _in_plane(part), place_numbers(part)
    spots = [_spots(in_plane, np.flatnonzero(numbers == n)) for n in range(int(numbers.max()) + 1)]
    if max(map(len, spots)) < 2:
        return []
    stacks: list[list[int]] = []
    for here in spots:
        away = sorted(
            (float(np.linalg.norm(in_plane[spot[0]] - in_plane[stack[-1]])), k, n)
            for k, spot in enumerate(here)
            for n, stack in enumerate(stacks)
        )
        joined: dict[int, int] = {}
        for _, k, n in away:
            if k not in joined and n not in joined.values():
                joined[k] = n
        for k, spot in enumerate(here):
            if k in joined:
                stacks[joined[k]] += spot
            else:
                stacks.append(spot)
    return [(f"aside {n}", [part[i] for i in stack]) for n, stack in enumerate(stacks)]


def _spots(in_plane: NDArray[np.float64], slices: NDArray[np.int64]) -> list[list[int]]:
    """Return the slices of one place by where they lie in the plane, in an order that does not depend on theirs."""
    spots: list[list[int]] = []
    for i in slices[np.lexsort((in_plane[slices, 1], in_plane[slices, 0]))]:
        for spot in spots:
            if np.linalg.norm(in_plane[i] - in_plane[spot[0]]) <= DRIFT_MM:
                spot.append(int(i))
                break
        else:
            spots.append([int(i)])
    return spots


def cut_at_jumps(slices: Sequence[InstanceHeader]) -> list[Pass]:
    """Return the parts of slices, in the order of their positions, between which the centre of the image jumps.

    A tilted gantry moves it from slice to slice, by as much more as they lie apart.
    """
    steps, gaps = np.diff(_in_plane(slices), axis=0), np.diff(along(slices))
    if len(steps) < 2 or gaps.min() <= 0:
        return []
    tilt = np.median(steps / gaps[:, None], axis=0)
    cuts = np.flatnonzero(np.linalg.norm(steps - gaps[:, None] * tilt, axis=1) > DRIFT_MM) + 1
    parts = [list(slices[a:b]) for a, b in zip([0, *cuts], [*cuts, len(slices)], strict=True)]
    return [(f"centre {n}", part) for n, part in enumerate(parts)] if len(cuts) else []


def _in_plane(part: Sequence[InstanceHeader]) -> NDArray[np.float64]:
    """Return where the first pixel of each slice lies along the first slice's rows and columns (mm)."""
    orientation = part[0].orientation
    assert orientation is not None
    axes = np.stack([unit(orientation[:3]), unit(orientation[3:])], axis=1)
    return np.asarray(np.asarray([header.position for header in part], dtype=np.float64) @ axes)
