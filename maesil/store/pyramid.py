"""Smaller levels of a volume for those who look at it: each voxel is the mean of the valid ones below it.

Training reads level 0 alone. A level halves the axes along which voxels lie close, so that voxels come near to cubes:
(5, 0.7, 0.7) mm becomes (5, 1.4, 1.4), (5, 2.8, 2.8), (5, 5.6, 5.6), then (10, 11.2, 11.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maesil.types import AIR_HU, MAP_CELL, HuArray, MapArray, Planes, Spacing, Zyx

_LONGEST = 64
"""The smallest level has no axis longer than this (voxels)."""
_SLAB_VOXELS = 1 << 23
_ALL = 255

Room = Callable[[Zyx, Any], Planes]
"""Zeros of a shape and a dtype: in memory, or where a long scan has its voxels."""


@dataclass(frozen=True)
class Level:
    """One level of a volume."""

    shape: Zyx
    halved: Zyx
    """How many voxels of the level before become one, along z, y, x: 1 or 2."""
    factors: Zyx
    """How many voxels of level 0 become one."""

    @property
    def name(self) -> str:
        """Name of its steps, for people: ``4x8x8``."""
        return "x".join(map(str, self.factors))


def levels_below(shape: Zyx, spacing: Spacing) -> list[Level]:
    """Return the levels below level 0 of a volume of this shape (voxels) and spacing (mm)."""
    levels, factors = [], (1, 1, 1)
    while max(shape) > _LONGEST:
        steps = [mm * n for mm, n in zip(spacing, factors, strict=True)]
        finest = min(step for step, n in zip(steps, shape, strict=True) if n > 1)
        z, y, x = (2 if n > 1 and step < sqrt(2) * finest else 1 for step, n in zip(steps, shape, strict=True))
        shape = (-(-shape[0] // z), -(-shape[1] // y), -(-shape[2] // x))
        factors = (factors[0] * z, factors[1] * y, factors[2] * x)
        levels.append(Level(shape, (z, y, x), factors))
    return levels


def smaller(hu: Planes, valid: MapArray, spacing: Spacing, room: Room, slab: int = 0) -> list[tuple[Level, Planes]]:
    """Return the levels below a volume ``[z, y, x]``, int16 HU; -1024 where nothing valid lies below them.

    ``valid`` is its map. Where a cell is partly valid, voxels of -1024 HU count as padding. ``slab`` slices, a multiple
    of 8, are read at a time; by default so many as 8 million voxels have.
    """
    z, y, x = hu.shape
    made: list[tuple[Level, Planes]] = []
    above, inside = hu, None
    for level in levels_below((z, y, x), spacing):
        below, known = room(level.shape, np.int16), room(level.shape, np.bool_)
        for source, target in _slabs(above.shape, level.halved[0], slab):
            part = np.asarray(above[source, : above.shape[1], : above.shape[2]])
            mask = _valid_voxels(part, valid, source) if inside is None else np.asarray(inside[source])
            below[target], known[target] = mean_of_valid(part, mask, level.halved)
        made.append((level, below))
        above, inside = below, known
    return made


def mean_of_valid(hu: HuArray, valid: NDArray[np.bool_] | None, halved: Zyx) -> tuple[HuArray, NDArray[np.bool_]]:
    """Return the mean of the valid voxels of each block, to whole HU, and which blocks have any; None: all are valid.

    Blocks at the end of an axis may be thinner.
    """
    z, y, x = (-(-n // step) for n, step in zip(hu.shape, halved, strict=True))
    total, count = np.zeros((z, y, x), np.float32), np.zeros((z, y, x), np.uint8)
    for first in product(*map(range, halved)):
        every = tuple(slice(start, None, step) for start, step in zip(first, halved, strict=True))
        voxels = hu[every]
        at = tuple(slice(0, n) for n in voxels.shape)
        total[at] += voxels if valid is None else np.where(valid[every], voxels, np.int16(0))
        count[at] += np.uint8(1) if valid is None else valid[every]
    inside = count > 0
    mean = np.rint(total / np.maximum(count, 1)).astype(np.int16)  # exact: sums of eight int16 fit float32
    mean[~inside] = AIR_HU
    return mean, inside


def _valid_voxels(hu: HuArray, valid: MapArray, source: slice) -> NDArray[np.bool_] | None:
    """Return which voxels of some slices are no padding, or None where all are."""
    cells = valid[source.start // MAP_CELL : -(-source.stop // MAP_CELL)] == _ALL
    if cells.all():
        return None
    wholly = cells.repeat(MAP_CELL, 0)[: hu.shape[0]]
    wholly = wholly.repeat(MAP_CELL, 1)[:, : hu.shape[1]].repeat(MAP_CELL, 2)[:, :, : hu.shape[2]]
    return np.asarray(wholly | (hu != AIR_HU))


def _slabs(shape: tuple[int, ...], halved: int, slab: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of a level, and what they become in the next one."""
    step = 2 * MAP_CELL
    count = slab or max(step, _SLAB_VOXELS // prod(shape[1:]) // step * step)
    for start in range(0, shape[0], count):
        stop = min(start + count, shape[0])
        yield slice(start, stop), slice(start // halved, -(-stop // halved))
