"""Values that ran over the end of their words and came back at the other: specks in air, holes in metal.

A word of n bits wraps by 2^n. Neighbours that differ by about as much are the sign, however few they are: a scanner
blurs over more than one voxel, so that even metal in air hardly jumps so far from one voxel to the next. The rules are
ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.types import Planes

_WIDE, _NARROW = 1 << 16, 1 << 12
"""How far words of 16 and of 12 bits wrap (HU, at a slope of 1)."""
_JUMP = (0.8, 1.2)
_FEWEST_WIDE, _FEWEST_NARROW = 4, 32
_RANGE_OF_12_BITS = (0.9, 1.02)
_MOST_EDGES = 0.5
_END = 0.2
"""A jump over most of the range leads from the upper fifth of it to the lower."""
_CLIPPED = 0.2
_AIR_HU = -850
_SPECK_EDGES = 2.5
"""Edges in the plane for each voxel: a single one has 4, a solid piece far fewer."""


def wrapped(hu: Planes, valid: Planes) -> Iterator[Refused]:
    """Yield why valid voxels ``[z, y, x]`` cannot all be HU: some wrapped."""
    low = min(float(plane.min(where=inside, initial=np.inf)) for plane, inside in zip(hu, valid, strict=True))
    high = max(float(plane.max(where=inside, initial=-np.inf)) for plane, inside in zip(hu, valid, strict=True))
    if high - low < _JUMP[0] * _NARROW:
        return
    if high - low >= _JUMP[0] * _WIDE:
        count = sum(len(upper) for upper, _, _ in _jumps(hu, valid, low, high, _WIDE))
        if count >= _FEWEST_WIDE:
            yield _refusal(count, 16)
    elif _RANGE_OF_12_BITS[0] * _NARROW <= high - low <= _RANGE_OF_12_BITS[1] * _NARROW:
        yield from _wrapped_12_bits(hu, valid, low, high)


def _refusal(count: int, bits: int) -> Refused:
    text = f"{count} neighbouring voxels differ by about 2^{bits}: values ran over the end of their words"
    return Refused("wrapped", text, jumps=count, bits=bits)


def _wrapped_12_bits(hu: Planes, valid: Planes, low: float, high: float) -> Iterator[Refused]:
    """12 bits are also the range of a clipped CT: metal in air may jump as far, but ends at one number."""
    found = list(_jumps(hu, valid, low, high, _NARROW))
    upper, lower = (np.concatenate([each[n] for each in found] or [np.empty(0)]) for n in (0, 1))
    if len(upper) < _FEWEST_NARROW:
        return
    top_edges, bottom_edges, top_voxels = (sum(each[2][n] for each in found) for n in range(3))
    clipped = max(float((upper == high).mean()), float((lower == low).mean()))
    share = len(upper) / max(min(top_edges, bottom_edges), 1)
    if share < _MOST_EDGES or clipped > _CLIPPED:
        return
    if np.median(lower) > _AIR_HU or top_edges >= _SPECK_EDGES * top_voxels:
        yield _refusal(len(upper), 12)


def _jumps(
    hu: Planes, valid: Planes, low: float, high: float, wrap: int
) -> Iterator[tuple[NDArray[Any], NDArray[Any], tuple[int, int, int]]]:
    """Yield for each slice with jumps their upper and lower values, and counts.

    The counts are of pairs with one voxel in the upper fifth of the range, of those with one in the lower fifth, and of
    voxels in the upper fifth.
    """
    middle, reach = (low + high) / 2, (0.5 - _END) * wrap
    for plane, inside in zip(hu, valid, strict=True):
        known = plane[inside]
        if not known.size or known.max() - known.min() < _JUMP[0] * wrap:
            continue
        top, bottom = plane > middle + reach, plane < middle - reach
        upper, lower, edges = [], [], [0, 0, int((top & inside).sum())]
        for before, after in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
            both = inside[before] & inside[after]
            edges[0] += int((both & (top[before] != top[after])).sum())
            edges[1] += int((both & (bottom[before] != bottom[after])).sum())
            step = np.abs(plane[before] - plane[after])
            far = both & (step >= _JUMP[0] * wrap) & (step <= _JUMP[1] * wrap)
            upper.append(np.maximum(plane[before][far], plane[after][far]))
            lower.append(np.minimum(plane[before][far], plane[after][far]))
        yield np.concatenate(upper), np.concatenate(lower), (edges[0], edges[1], edges[2])
