"""The superpatches of one array of a volume: encoded and written on a pool of threads, and read back on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype

from maesil.errors import StoreError
from maesil.store.records import Superpatch
from maesil.store.shard import (
    check_and_decode,
    compressors,
    encode,
    locate,
    read_shard_index,
    shard_entry,
    shard_parts,
    tiles_per_shard,
)
from maesil.store.storage import Storage
from maesil.types import AIR_HU, HuArray, Planes, Zyx

OTHER_BYTES = "other bytes than were written; check disk, network and memory"
Shares = Callable[[Zyx, HuArray], tuple[float, float, float]]
"""From a superpatch's place and voxels its shares of valid, body and air."""


def read_back_metadata(storage: Storage, prefix: str, node: zarr.Group | zarr.Array[Any]) -> str:
    """Return the key of a node that was just written; `StoreError` unless its metadata is found as it was written."""
    key = "/".join(part for part in (prefix, node.path) if part)
    for name, document in node.metadata.to_buffer_dict(default_buffer_prototype()).items():
        if storage.read(f"{key}/{name}") != document.to_bytes():
            raise StoreError(f"{storage.root}/{key}/{name}: read back {OTHER_BYTES}")
    return key


def _no_shares(index: Zyx, hu: HuArray) -> tuple[float, float, float]:
    """Nobody asks for those of a smaller level."""
    return 0.0, 0.0, 0.0


@dataclass(frozen=True)
class Attempt:
    """The folder that a volume is written to, and how."""

    storage: Storage
    prefix: str
    edge: int
    """Of a superpatch (voxels)."""
    codec: str


class Tiles:
    """The superpatches of one array of an attempt, int16 HU."""

    def __init__(self, attempt: Attempt, name: str, hu: Planes) -> None:
        self._storage, self._prefix, self._name, self._hu = attempt.storage, attempt.prefix, name, hu
        self._edge, self._codec = edge, _ = attempt.edge, attempt.codec
        z, y, x = (-(-n // edge) for n in hu.shape)
        self._per_shard = tiles_per_shard((z, y, x))
        self._places = {index: locate(index, self._per_shard) for index in product(range(z), range(y), range(x))}
        self._shards = sorted({shard for shard, _ in self._places.values()})
        self._scratch = _Scratch(edge)

    def create(self, group: zarr.Group) -> None:
        """Write the metadata of the array."""
        self._array = group.create_array(
            self._name,
            shape=self._hu.shape,
            chunks=(self._edge,) * 3,
            shards=tuple(n * self._edge for n in self._per_shard),
            dtype="int16",
            fill_value=AIR_HU,
            compressors=compressors(self._codec),
            dimension_names=("z", "y", "x"),
        )

    def write(self, pool: ThreadPoolExecutor) -> None:
        """Write all superpatches, also empty ones: an absent one must always mean damage."""
        for shard in self._shards:
            held = {index: inner for index, (name, inner) in self._places.items() if name == shard}
            encoded = zip(held.values(), pool.map(self._encode, held), strict=True)
            self._storage.put_parts(self._key(shard), shard_parts(self._per_shard, encoded))

    def read_back(
        self, pool: ThreadPoolExecutor, shares: Shares = lambda index, hu: (0.0, 0.0, 0.0)
    ) -> list[Superpatch]:
        """Return all superpatches as they were found in the files; `StoreError` if one is not what was written."""
        read_back_metadata(self._storage, self._prefix, self._array)
        tables = {shard: read_shard_index(self._storage, self._key(shard), self._per_shard) for shard in self._shards}
        return list(pool.map(lambda index: self._read_back(index, tables, shares), self._places))

    def _key(self, shard: str) -> str:
        return f"{self._prefix}/{self._name}/{shard}"

    def _encode(self, index: Zyx) -> tuple[bytes, bytes]:
        np.copyto(self._scratch.decoded, self._voxels(index))
        return encode(self._scratch.decoded, self._codec)

    def _read_back(self, index: Zyx, tables: dict[str, NDArray[np.uint64]], shares: Shares) -> Superpatch:
        shard, inner = self._places[index]
        key = self._key(shard)
        where = f"{self._storage.root}: {self._prefix}, level {self._name}, superpatch {index}"
        offset, length = shard_entry(tables[shard], inner, where)
        encoded, found = np.frombuffer(self._storage.read_range(key, offset, length), np.uint8), self._scratch.decoded
        crc = int.from_bytes(encoded[-4:], "little")
        check_and_decode(encoded, crc, self._codec, found, where)
        if not np.array_equal(found, self._voxels(index)):
            raise StoreError(f"{where}: read back other voxels than were written; check disk and memory")
        return Superpatch(index, key, offset, length, crc, *shares(index, found))

    def _voxels(self, index: Zyx) -> HuArray:
        """Return a superpatch, air beyond the volume; it holds until this thread asks for the next."""
        part: HuArray = self._hu[tuple(slice(i * self._edge, (i + 1) * self._edge) for i in index)]
        if part.shape == (self._edge,) * 3:
            return part
        padded = self._scratch.padded
        padded.fill(AIR_HU)
        padded[tuple(slice(0, n) for n in part.shape)] = part
        return padded


class _Scratch(threading.local):
    """Superpatches that each thread uses again: fresh memory would cost a page fault every 4 KiB."""

    def __init__(self, edge: int) -> None:
        self.padded: HuArray = np.empty((edge,) * 3, dtype=np.int16)
        self.decoded: HuArray = np.empty((edge,) * 3, dtype=np.int16)
