"""The RAM tier: superpatches stay in memory once they were read, as many as a budget holds.

Which ones stay is decided at the start, those with the most body first: training asks for them most often, and it goes
round and round, where a cache that evicts the oldest would never hold what comes next. So nothing is counted, locked
or evicted while threads read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maesil.cache.memory import available_memory
from maesil.sizes import parse_size
from maesil.store.reader import ReadInto, SuperpatchReader
from maesil.store.records import Superpatch, Volume
from maesil.store.store import Store
from maesil.types import HuArray

_Place = tuple[str, int]
"""Shard file and offset: what tells the superpatches of a store apart."""


class RamReader(SuperpatchReader):
    """A reader that keeps some superpatches of its store in memory: ``decoded``, or encoded as in their shard."""

    def __init__(self, store: Store, kept: frozenset[_Place], decoded: bool, read_into: ReadInto | None = None) -> None:
        super().__init__(store, read_into)
        self._kept, self._decoded = kept, decoded
        self._voxels: dict[_Place, HuArray] = {}
        self._bytes: dict[_Place, NDArray[np.uint8]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held in memory so far."""
        return sum(a.nbytes for a in self._voxels.values()) + sum(a.nbytes for a in self._bytes.values())

    def _read(self, volume_id: str, patch: Superpatch, codec: str, out: HuArray) -> None:
        place = (patch.path, patch.offset)
        if (voxels := self._voxels.get(place)) is not None and voxels.shape == out.shape:
            np.copyto(out, voxels)
            return
        super()._read(volume_id, patch, codec, out)
        if self._decoded and place in self._kept:
            self._voxels[place] = out.copy()

    def _encoded(self, patch: Superpatch) -> NDArray[np.uint8]:
        place = (patch.path, patch.offset)
        if (encoded := self._bytes.get(place)) is not None and len(encoded) == patch.length:
            return encoded
        encoded = super()._encoded(patch)
        if not self._decoded and place in self._kept:
            encoded = self._bytes[place] = encoded.copy()
        return encoded


def ram_readers(
    stores: Sequence[Store], budget: int, sources: Sequence[ReadInto | None] | None = None
) -> tuple[RamReader, ...]:
    """Return one reader a store; together they keep up to ``budget`` bytes.

    ``sources`` read superpatches in place of the stores' storages (`SuperpatchReader`), one per store.

    Decoded where all superpatches fit so (a copy in place of a decode), else encoded (memory in place of the disk).
    """
    everything = sorted(
        ((number, volume, patch) for number, store in enumerate(stores) for volume, patch in _superpatches(store)),
        key=lambda entry: -entry[2].body,
    )
    decoded = sum(_decoded_size(volume) for _, volume, _ in everything) <= budget
    kept: list[set[_Place]] = [set() for _ in stores]
    for number, volume, patch in everything:
        budget -= _decoded_size(volume) if decoded else patch.length
        if budget < 0:
            break
        kept[number].add((patch.path, patch.offset))
    from_where = sources or [None] * len(stores)
    return tuple(
        RamReader(store, frozenset(places), decoded, read_into)
        for store, places, read_into in zip(stores, kept, from_where, strict=True)
    )


def _superpatches(store: Store) -> list[tuple[Volume, Superpatch]]:
    return [(volume, patch) for volume in store.volumes() for patch in volume.superpatches]


def _decoded_size(volume: Volume) -> int:
    return 2 * volume.tile**3


def budget_bytes(size: str, processes: int = 1) -> int:
    """Return the bytes that ``train.ram`` means for one of the processes that train on this machine.

    Together they take a size (`maesil.sizes.parse_size`), or with ``auto`` half of the free memory; nothing where it
    is empty.
    """
    if size == "auto":
        return available_memory() // 2 // processes
    return parse_size(size, "train.ram") // processes if size else 0
