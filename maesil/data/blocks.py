"""What one visit to a block does: read each superpatch that its crops touch once, and cut all of them from it.

Shapes: c crop edges (voxels; a cube has one), k = c / 8 cells of the maps, T superpatch edge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from maesil.data.crops import blank_outside_scan
from maesil.data.sampler import Draw
from maesil.store.grid import copy_overlap, tile_start, tiles_under
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.types import MAP_CELL, HuArray, MapArray, Zyx


class CropBuffer(NamedTuple):
    """Where one crop goes."""

    hu: HuArray
    """int16 HU ``[c, c, c]``."""
    valid: MapArray
    """uint8 ``[k, k, k]``: share, 0..255, of each cell inside the scan."""
    body: MapArray
    """uint8 ``[k, k, k]``: share inside the patient's body."""


def work_of_visit(
    readers: Sequence[SuperpatchReader], draws: Sequence[Draw], buffers: Sequence[CropBuffer]
) -> Iterator[Callable[[], None]]:
    """Yield what fills a visit's crops, a buffer each, one call per superpatch: in any order, on any threads.

    No two calls write the same voxel. The crops lie within the grid of superpatches, as a sampler draws them.
    """
    reader, volume = readers[draws[0].store], draws[0].volume
    touching: dict[Zyx, list[tuple[Zyx, HuArray]]] = defaultdict(list)
    for draw, buffer in zip(draws, buffers, strict=True):
        for index in tiles_under(volume, draw.origin, buffer.hu.shape):
            touching[index].append((draw.origin, buffer.hu))
    yield partial(_read_maps, reader, draws, buffers)
    for index, crops in touching.items():
        yield partial(_cut_crops, reader, volume, index, crops)


def _read_maps(reader: SuperpatchReader, draws: Sequence[Draw], buffers: Sequence[CropBuffer]) -> None:
    for draw, buffer in zip(draws, buffers, strict=True):
        for name, cells in (("valid", buffer.valid), ("body", buffer.body)):
            reader.read_map_region(draw.volume.volume_id, name, draw.origin, buffer.hu.shape, cells)


def _cut_crops(reader: SuperpatchReader, volume: Volume, index: Zyx, crops: Sequence[tuple[Zyx, HuArray]]) -> None:
    """Copy what lies in one superpatch into each of these crops, given by first voxel and buffer."""
    start, (origin, hu) = tile_start(volume, index), crops[0]
    if len(crops) == 1 and origin == start and hu.shape == (volume.tile,) * 3:
        reader.read_superpatch(volume.volume_id, index, hu)  # all of it: nothing to cut
        _blank(reader, volume, start, hu)
        return
    tile = reader.borrow_superpatch(volume.volume_id, index)
    _blank(reader, volume, start, tile)
    for origin, hu in crops:
        copy_overlap(tile, start, hu, origin)


def _blank(reader: SuperpatchReader, volume: Volume, start: Zyx, tile: HuArray) -> None:
    """Set what is outside the scan to air. Beyond the volume it is air already, so says the format."""
    z, y, x = (min(volume.tile, -(-(n - s) // MAP_CELL) * MAP_CELL) for n, s in zip(volume.shape, start, strict=True))
    blank_outside_scan(tile, reader.read_map_region(volume.volume_id, "valid", start, (z, y, x)))
