"""What one visit reads: the superpatches that its crops touch, each decoded once, and crops cut from them."""

from __future__ import annotations

import threading

import numpy as np

from maesil.cache.reader import SuperpatchReader, copy_overlap, tile_start, tiles_under
from maesil.commit import Volume
from maesil.data import blank_outside_scan
from maesil.types import AIR_HU, MAP_CELL, HuArray, Zyx


class Buffers:
    """Memory for superpatches that goes from visit to visit. Lists hand over their items atomically: no lock."""

    def __init__(self) -> None:
        self._free: list[HuArray] = []

    def take(self, edge: int) -> HuArray:
        """Return a buffer of this edge (voxels), with anything in it."""
        try:
            buffer = self._free.pop()
        except IndexError:
            return np.empty((edge,) * 3, dtype=np.int16)
        return buffer if len(buffer) == edge else np.empty((edge,) * 3, dtype=np.int16)

    def give(self, buffer: HuArray) -> None:
        """Take a buffer back; nobody may look at it any more."""
        self._free.append(buffer)


class Block:
    """The superpatches of a volume that the crops of one visit touch. Several threads may cut crops at a time."""

    def __init__(self, reader: SuperpatchReader, volume: Volume, buffers: Buffers) -> None:
        self._reader, self._volume, self._buffers = reader, volume, buffers
        self._tiles: dict[Zyx, HuArray] = {}
        self._lock = threading.Lock()

    def cut(self, origin: Zyx, out: HuArray) -> None:
        """Copy the crop at ``origin`` into ``out`` (int16 ``[c, c, c]``): air where there is no scan."""
        T, size = self._volume.tile, (out.shape[0], out.shape[1], out.shape[2])
        tiles = list(tiles_under(self._volume, origin, size))
        if size == (T, T, T) and tile_start(self._volume, tiles[0]) == origin and tiles[0] not in self._tiles:
            self._read(tiles[0], out)  # a whole superpatch: nothing to cut
            return
        if any(o + n > g * T for o, n, g in zip(origin, size, self._volume.grid, strict=True)):
            out.fill(AIR_HU)
        for index in tiles:
            copy_overlap(self._tile(index), tile_start(self._volume, index), out, origin)

    def release(self) -> None:
        """Hand the memory on to other visits, after the last crop was cut."""
        for buffer in self._tiles.values():
            self._buffers.give(buffer)
        self._tiles = {}

    def _tile(self, index: Zyx) -> HuArray:
        with self._lock:
            if index not in self._tiles:
                self._tiles[index] = self._read(index, self._buffers.take(self._volume.tile))
            return self._tiles[index]

    def _read(self, index: Zyx, out: HuArray) -> HuArray:
        volume = self._volume
        self._reader.read_superpatch(volume.volume_id, index, out)
        start = tile_start(volume, index)
        # Beyond the volume superpatches are padded with air, so says the format: only what is in it needs a look.
        z, y, x = (
            min(volume.tile, -(-(n - s) // MAP_CELL) * MAP_CELL) for n, s in zip(volume.shape, start, strict=True)
        )
        blank_outside_scan(out, self._reader.read_map_region(volume.volume_id, "valid", start, (z, y, x)))
        return out
