"""From an entry of a commit or a row of the index to a caller's buffer: one positioned read, one checksum, one decode.

Damage raises `StoreError`: a missing or shortened shard, a flipped bit, a chunk of another size. Nothing is ever
replaced by a fill value (plain Zarr readers do that with a missing chunk).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from maesil.errors import StoreError
from maesil.store.arrays import read_small_array
from maesil.store.grid import copy_overlap, tile_start, tiles_under
from maesil.store.records import Superpatch, Volume
from maesil.store.shard import check_and_decode
from maesil.store.storage import Storage
from maesil.store.store import Store
from maesil.types import AIR_HU, MAP_CELL, HuArray, MapArray, Zyx

MAPS = ("valid", "body")
_MAPS_KEPT = 4096
"""Maps that a reader keeps in memory, 0.1 to 0.2 MB each; the oldest makes room for the next."""
ReadInto = Callable[[str, int, memoryview], None]
"""What fills a buffer with the bytes of a file from an offset, as `Storage.read_into` does."""


class SuperpatchReader:
    """Reads superpatches, boxes and maps of the volumes of one store.

    May be shared between threads, which read at the same time (no lock; decoding releases Python's), and across a
    fork: there is no open file and nothing that a thread left behind could hold.
    """

    def __init__(self, store: Store, read_into: ReadInto | None = None) -> None:
        """``read_into`` reads superpatches in place of the store's storage, such as from copies nearer by."""
        # On the main thread numcodecs would decode with a pool of its own, which would compete with our threads.
        blosc.use_threads = False
        self.storage: Storage = store.storage
        self._read_into = read_into or store.storage.read_into
        self.volumes: dict[str, Volume] = {volume.volume_id: volume for volume in store.volumes()}
        self._superpatches: dict[str, dict[Zyx, Superpatch]] = {}
        self._maps: dict[tuple[str, str], MapArray] = {}
        self._scratch = _Scratch()

    def read_superpatch(self, volume_id: str, index: Zyx, out: HuArray | None = None) -> HuArray:
        """Return one superpatch, int16 HU ``[T, T, T]``, decoded into ``out`` if given (C-contiguous)."""
        volume = self.volumes[volume_id]
        if out is None:
            out = np.empty((volume.tile,) * 3, dtype=np.int16)
        self._read(volume_id, self._superpatches_of(volume)[index], volume.codec, out)
        return out

    def _superpatches_of(self, volume: Volume) -> dict[Zyx, Superpatch]:
        """Return the superpatches of a volume by index, once any of them is read: all of a large store take long."""
        found = self._superpatches.get(volume.volume_id)
        if found is None:  # two threads may make it at once; one result stays
            found = self._superpatches.setdefault(volume.volume_id, {p.index: p for p in volume.superpatches})
        return found

    def borrow_superpatch(self, volume_id: str, index: Zyx) -> HuArray:
        """Return one superpatch in memory of this thread's: it holds until the thread reads or borrows the next."""
        return self.read_superpatch(volume_id, index, self._scratch.tile(self.volumes[volume_id].tile))

    def read_superpatches(self, rows: Sequence[Mapping[str, Any]], out: HuArray) -> HuArray:
        """Decode the superpatches of rows of the index (``superpatches.parquet``) into ``out``, int16 ``[n, T, T, T]``.

        A row says all that is needed; the commits are not asked. An index older than the store ends in a `StoreError`.
        """
        for row, superpatch in zip(rows, out, strict=True):
            fields = {field: row[field] for field in ("path", "offset", "length", "crc32c", "valid", "body", "air")}
            patch = Superpatch(index=(row["iz"], row["iy"], row["ix"]), **fields)
            self._read(row["volume_id"], patch, row["codec"], superpatch)
        return out

    def _read(self, volume_id: str, patch: Superpatch, codec: str, out: HuArray) -> None:
        where = f"{self.storage.root}: volume {volume_id}, superpatch {patch.index}, {patch.path}"
        check_and_decode(self._encoded(patch), patch.crc32c, codec, out, where)

    def _encoded(self, patch: Superpatch) -> NDArray[np.uint8]:
        """Return the bytes of a superpatch; they hold until this thread reads the next one."""
        encoded = self._scratch.encoded(patch.length)
        self._read_into(patch.path, patch.offset, encoded.data)
        return encoded

    def read_region(self, volume_id: str, start: Zyx, size: Zyx, out: HuArray | None = None) -> HuArray:
        """Return any box of a volume, int16 HU ``size``; -1024 where it leaves the volume."""
        volume = self.volumes[volume_id]
        if out is None:
            out = np.empty(size, dtype=np.int16)
        elif out.shape != tuple(size) or out.dtype != np.int16:
            raise ValueError(f"expected an int16 buffer of shape {tuple(size)}, found {out.dtype} {out.shape}")
        tiles = list(tiles_under(volume, start, size))
        whole = len(tiles) == 1 and tile_start(volume, tiles[0]) == start and size == (volume.tile,) * 3
        if whole and out.flags.c_contiguous:
            return self.read_superpatch(volume_id, tiles[0], out)
        if any(s < 0 or s + n > g * volume.tile for s, n, g in zip(start, size, volume.grid, strict=True)):
            out.fill(AIR_HU)
        for index in tiles:
            tile = self.borrow_superpatch(volume_id, index)
            copy_overlap(tile, tile_start(volume, index), out, start)
        return out

    def read_map(self, volume_id: str, name: str) -> MapArray:
        """Return a whole map, uint8 ``[ceil(z/8), ceil(y/8), ceil(x/8)]``: the share, 0..255, of each 8^3 cell."""
        cells = self._maps.get((volume_id, name))
        if cells is None:  # two threads may load it at once; one result stays
            cells = load_map(self.storage, self.volumes[volume_id], name)
            cells = self._maps.setdefault((volume_id, name), cells)
            if len(self._maps) > _MAPS_KEPT:
                with suppress(RuntimeError):  # another thread took one away at this very moment
                    self._maps.pop(next(iter(self._maps)), None)
        return cells

    def read_map_region(
        self, volume_id: str, name: str, start: Zyx, size: Zyx, out: MapArray | None = None
    ) -> MapArray:
        """Return the part of a map under a box whose start and size are multiples of 8; 0 outside the volume."""
        if any(value % MAP_CELL for value in (*start, *size)):
            raise ValueError(f"a map region needs multiples of {MAP_CELL}, found start {start}, size {size}")
        cells = self.read_map(volume_id, name)
        if out is None:
            out = np.empty([n // MAP_CELL for n in size], dtype=np.uint8)
        out.fill(0)
        z, y, x = (s // MAP_CELL for s in start)
        copy_overlap(cells, (0, 0, 0), out, (z, y, x))
        return out


class StoredPlanes:
    """The voxels of a stored volume; a box is read when it is asked for."""

    def __init__(self, reader: SuperpatchReader, volume: Volume) -> None:
        self._reader, self._volume = reader, volume
        self.shape, self.dtype = volume.shape, np.dtype(np.int16)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[z : z + 1, : self.shape[1], : self.shape[2]][0] for z in range(len(self)))

    def __getitem__(self, box: Any) -> Any:
        bounds = [part.indices(n)[:2] for part, n in zip(box, self.shape, strict=True)]
        z, y, x = (max(0, stop - start) for start, stop in bounds)
        start = (bounds[0][0], bounds[1][0], bounds[2][0])
        return self._reader.read_region(self._volume.volume_id, start, (z, y, x))

    def __setitem__(self, index: Any, values: Any) -> None:
        raise TypeError("expected a volume to write to, found one of a store")


class _Scratch(threading.local):
    """Buffers that each thread reuses: fresh memory would cost a page fault every 4 KiB, more than reading does."""

    def __init__(self) -> None:
        self._encoded = np.empty(0, dtype=np.uint8)
        self._tile = np.empty((0, 0, 0), dtype=np.int16)

    def encoded(self, length: int) -> NDArray[np.uint8]:
        if len(self._encoded) < length:
            self._encoded = np.empty(length, dtype=np.uint8)
        return self._encoded[:length]

    def tile(self, edge: int) -> HuArray:
        if len(self._tile) != edge:
            self._tile = np.empty((edge,) * 3, dtype=np.int16)
        return self._tile


def load_map(storage: Storage, volume: Volume, name: str) -> MapArray:
    """Return a map, ``valid`` or ``body``: uint8 shares of the volume's cells; `StoreError` on damage."""
    if name not in MAPS:
        raise ValueError(f"expected a map of {MAPS}, found {name!r}")
    cells = read_small_array(storage, volume, name)
    expected = tuple(-(-n // MAP_CELL) for n in volume.shape)
    if cells.shape != expected:
        where = f"{storage.root}: volume {volume.volume_id}, map {name!r}"
        raise StoreError(f"{where}: expected uint8 {expected}, found {cells.shape}")
    return cells
