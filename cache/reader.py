"""From an entry of a commit to a caller's buffer: one positioned read, one checksum, one decode.

Damage raises `StoreError`: a missing or shortened shard, a flipped bit, a chunk of another size. Nothing is ever
replaced by a fill value (plain Zarr readers do that with a missing chunk).
"""

from __future__ import annotations

import threading
from itertools import product

import numpy as np
import zarr

from maesil.commit import Volume
from maesil.errors import StoreError
from maesil.shard import decode_superpatch
from maesil.storage import Storage
from maesil.store import Store
from maesil.types import AIR_HU, MAP_CELL, HuArray, MapArray, Zyx

MAPS = ("valid", "body")
_ZARR_RAISES = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, FileNotFoundError)
"""What zarr-python raises on damaged metadata and chunks."""


class SuperpatchReader:
    """Reads superpatches, boxes and maps of the volumes of one store. Safe to share between threads."""

    def __init__(self, store: Store) -> None:
        self.storage: Storage = store.storage
        self.volumes: dict[str, Volume] = {volume.volume_id: volume for volume in store.volumes()}
        self._superpatches = {
            (volume.volume_id, patch.index): patch for volume in self.volumes.values() for patch in volume.superpatches
        }
        self._maps: dict[tuple[str, str], MapArray] = {}
        self._lock = threading.Lock()

    def read_superpatch(self, volume_id: str, index: Zyx, out: HuArray | None = None) -> HuArray:
        """Return one superpatch, int16 HU ``[T, T, T]``, decoded into ``out`` if given (C-contiguous)."""
        volume = self.volumes[volume_id]
        if out is None:
            out = np.empty((volume.tile,) * 3, dtype=np.int16)
        where = f"{self.storage.root}: volume {volume_id}, superpatch {index}"
        decode_superpatch(self.storage, self._superpatches[volume_id, index], volume.codec, out, where)
        return out

    def read_region(self, volume_id: str, start: Zyx, size: Zyx, out: HuArray | None = None) -> HuArray:
        """Return any box of a volume, int16 HU ``size``; -1024 where it leaves the volume."""
        volume = self.volumes[volume_id]
        if out is None:
            out = np.empty(size, dtype=np.int16)
        elif out.shape != tuple(size) or out.dtype != np.int16:
            raise ValueError(f"expected an int16 buffer of shape {tuple(size)}, found {out.dtype} {out.shape}")
        if size == (volume.tile,) * 3 and all(s % volume.tile == 0 for s in start) and out.flags.c_contiguous:
            index = (start[0] // volume.tile, start[1] // volume.tile, start[2] // volume.tile)
            if (volume_id, index) in self._superpatches:
                return self.read_superpatch(volume_id, index, out)
        out.fill(AIR_HU)
        touched = [
            range(max(0, s // volume.tile), min(g, -(-(s + n) // volume.tile)))
            for s, n, g in zip(start, size, volume.grid, strict=True)
        ]
        for iz, iy, ix in product(*touched):
            tile = self.read_superpatch(volume_id, (iz, iy, ix))
            _copy_overlap(tile, (iz * volume.tile, iy * volume.tile, ix * volume.tile), out, start)
        return out

    def read_map(self, volume_id: str, name: str) -> MapArray:
        """Return a whole map, uint8 ``[ceil(z/8), ceil(y/8), ceil(x/8)]``: the share, 0..255, of each 8^3 cell."""
        with self._lock:
            if (volume_id, name) not in self._maps:
                self._maps[volume_id, name] = load_map(self.storage, self.volumes[volume_id], name)
            return self._maps[volume_id, name]

    def read_map_region(self, volume_id: str, name: str, start: Zyx, size: Zyx) -> MapArray:
        """Return the part of a map under a box whose start and size are multiples of 8; 0 outside the volume."""
        if any(value % MAP_CELL for value in (*start, *size)):
            raise ValueError(f"a map region needs multiples of {MAP_CELL}, found start {start}, size {size}")
        cells = self.read_map(volume_id, name)
        out = np.zeros([n // MAP_CELL for n in size], dtype=np.uint8)
        z, y, x = (s // MAP_CELL for s in start)
        _copy_overlap(cells, (0, 0, 0), out, (z, y, x))
        return out


def load_map(storage: Storage, volume: Volume, name: str) -> MapArray:
    """Return a map through zarr-python: maps are small, hold their own crc32c, and their one chunk must be there."""
    if name not in MAPS:
        raise ValueError(f"expected a map of {MAPS}, found {name!r}")
    where = f"{storage.root}: volume {volume.volume_id}, map {name!r}"
    if not storage.exists(f"{volume.prefix}/{name}/c/0/0/0"):
        raise StoreError(f"{where}: its chunk is missing; delete the volume's folder below commits/ and ingest again")
    try:
        array = zarr.open_array(storage.zarr(f"{volume.prefix}/{name}", read_only=True), mode="r")
        cells = np.asarray(array[:])
    except _ZARR_RAISES as error:
        raise StoreError(
            f"{where}: damaged ({error}); delete the volume's folder below commits/ and ingest again"
        ) from error
    expected = tuple(-(-n // MAP_CELL) for n in volume.shape)
    if cells.shape != expected or cells.dtype != np.uint8:
        raise StoreError(f"{where}: expected uint8 {expected}, found {cells.dtype} {cells.shape}")
    return cells


def _copy_overlap(source: np.ndarray, source_at: Zyx, out: np.ndarray, out_at: Zyx) -> None:
    """Copy where two boxes given by their first voxel overlap."""
    into, take = [], []
    for s_at, s_n, o_at, o_n in zip(source_at, source.shape, out_at, out.shape, strict=True):
        low, high = max(s_at, o_at), min(s_at + s_n, o_at + o_n)
        if low >= high:
            return
        into.append(slice(low - o_at, high - o_at))
        take.append(slice(low - s_at, high - s_at))
    out[tuple(into)] = source[tuple(take)]
