"""Integrity check of a store: every byte that a commit vouches for is read, checked and decoded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np

from maesil.cache.reader import MAPS, SuperpatchReader, load_map
from maesil.commit import Volume
from maesil.errors import StoreError
from maesil.shard import decode_superpatch, locate, read_shard_index, shard_entry, tiles_per_shard
from maesil.store import Store
from maesil.types import AIR_HU


def verify(store: Store, on_volume: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Return one line for each piece of damage found in the live volumes; an empty list means all is well."""
    problems: list[str] = []
    volumes = SuperpatchReader(store).volumes
    for done, volume in enumerate(volumes.values(), start=1):
        problems.extend(_volume_problems(store, volume))
        on_volume(done, len(volumes))
    return problems


def _volume_problems(store: Store, volume: Volume) -> Iterator[str]:
    for check in (_array_problems, _shard_problems, _superpatch_problems, _map_problems):
        try:
            yield from check(store, volume)
        except StoreError as error:
            yield str(error)


def _array_problems(store: Store, volume: Volume) -> Iterator[str]:
    """The array must say what the commit says, or other Zarr readers would see something else."""
    key = f"{volume.prefix}/0/zarr.json"
    try:
        metadata = json.loads(store.storage.read(key))
        found = (tuple(metadata["shape"]), metadata["data_type"], metadata["fill_value"])
    except (ValueError, KeyError, TypeError) as error:
        yield f"{store.path}: {key}: damaged ({error})"
        return
    if found != (volume.shape, "int16", AIR_HU):
        yield f"{store.path}: {key}: expected shape {volume.shape}, int16, fill value {AIR_HU}, found {found}"


def _shard_problems(store: Store, volume: Volume) -> Iterator[str]:
    """The shards' own indices must lead other Zarr readers to the same bytes as the commit does."""
    per_shard = tiles_per_shard(volume.grid)
    tables = {}
    for patch in volume.superpatches:
        where = f"{store.path}: volume {volume.volume_id}, superpatch {patch.index}"
        shard, inner = locate(patch.index, per_shard)
        key = f"{volume.prefix}/0/{shard}"
        try:
            if key not in tables:
                tables[key] = read_shard_index(store.storage, key, per_shard)
            entry = shard_entry(tables[key], inner, where)
        except StoreError as error:
            yield str(error)
            continue
        if (patch.path, (patch.offset, patch.length)) != (key, entry):
            yield f"{where}: the commit says {patch.offset}+{patch.length}, the shard's index {entry[0]}+{entry[1]}"


def _superpatch_problems(store: Store, volume: Volume) -> Iterator[str]:
    buffer = np.empty((volume.tile,) * 3, dtype=np.int16)
    for patch in volume.superpatches:
        where = f"{store.path}: volume {volume.volume_id}, superpatch {patch.index}"
        try:
            decode_superpatch(store.storage, patch, volume.codec, buffer, where)
        except StoreError as error:
            yield str(error)


def _map_problems(store: Store, volume: Volume) -> Iterator[str]:
    for name in MAPS:
        try:
            load_map(store.storage, volume, name)
        except StoreError as error:
            yield str(error)
