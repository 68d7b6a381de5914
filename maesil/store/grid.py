"""Where superpatches lie in their volume, and where boxes overlap."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from maesil.store.records import Volume
from maesil.types import Edges, Zyx, zyx


def tile_start(volume: Volume, index: Zyx) -> Zyx:
    """Return the first voxel of a superpatch in its volume."""
    z, y, x = index
    return z * volume.tile, y * volume.tile, x * volume.tile


def tile_at(volume: Volume, voxel: Zyx) -> Zyx:
    """Return the superpatch of a volume that holds a voxel."""
    z, y, x = (at // volume.tile for at in voxel)
    return z, y, x


def tiles_under(volume: Volume, start: Zyx, size: Zyx) -> Iterator[Zyx]:
    """Yield the superpatches of a volume that a box touches."""
    touched = [
        range(max(0, s // volume.tile), min(g, -(-(s + n) // volume.tile)))
        for s, n, g in zip(start, size, volume.grid, strict=True)
    ]
    yield from product(*touched)


def box_at(start: Zyx, size: Edges) -> tuple[slice, slice, slice]:
    """Return the slices along z, y, x of a box."""
    z, y, x = (slice(s, s + n) for s, n in zip(start, zyx(size), strict=True))
    return z, y, x


def copy_overlap(source: np.ndarray, source_at: Zyx, out: np.ndarray, out_at: Zyx) -> None:
    """Copy where two boxes given by their first voxel overlap."""
    into, take = [], []
    for s_at, s_n, o_at, o_n in zip(source_at, source.shape, out_at, out.shape, strict=True):
        low, high = max(s_at, o_at), min(s_at + s_n, o_at + o_n)
        if low >= high:
            return
        into.append(slice(low - o_at, high - o_at))
        take.append(slice(low - s_at, high - s_at))
    out[tuple(into)] = source[tuple(take)]
