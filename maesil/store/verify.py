"""Integrity check of a store: every byte that a commit vouches for is read, checked and decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from maesil.documents import parsed_json
from maesil.errors import StoreError
from maesil.geometry import straight
from maesil.store.commit import id_and_generation
from maesil.store.index import index_problems
from maesil.store.ome import OME_VERSION, affine_of, level_paths, ome_version
from maesil.store.reader import MAPS, load_map
from maesil.store.records import Volume
from maesil.store.shard import decode_superpatch, locate, read_shard_index, shard_entry, tiles_per_shard
from maesil.store.store import GROUP_DOCUMENT, TABLE_VERSION, ZARR_DOCUMENT, Store
from maesil.store.table import StaleTableError
from maesil.store.thumbnails import THUMBNAIL, read_thumbnail
from maesil.types import AIR_HU

_NOT_OURS = (ValueError, KeyError, TypeError, IndexError, AttributeError)
"""What reading JSON raises that says something else than a store writes."""
_SAME_PLACE_MM = 1e-6


@dataclass(frozen=True)
class Verified:
    """What was checked, and one line for each piece of damage found."""

    volumes: int
    superpatches: int
    problems: tuple[str, ...]


def verify(store: Store, on_volume: Callable[[int, int], None] = lambda done, total: None) -> Verified:
    """Check recipes, records, superpatches, maps and Zarr metadata of all live volumes; damage never ends the check."""
    problems = [*_recipe_problems(store), *_quarantine_problems(store), *_group_problems(store)]
    problems += [*index_problems(store), *table_problems(store)]
    superpatches = 0
    keys = store.live_commits()
    for done, key in enumerate(keys, start=1):
        try:
            volume = store.read_commit(key)
            superpatches += len(volume.superpatches)
            problems.extend(dict.fromkeys(_volume_problems(store, volume)))
        except StoreError as error:
            problems.append(str(error))
        on_volume(done, len(keys))
    return Verified(len(keys), superpatches, tuple(problems))


def table_problems(store: Store) -> Iterator[str]:
    """Yield one line for each volume of which the table says something else than its commit, or for the whole of it."""
    if store.version < TABLE_VERSION:
        return
    anew = "make it anew with `maesil store index`"
    try:
        told = store.table.volumes()
    except StaleTableError as error:
        yield f"{store.path}: the table of volumes {error}; {anew}"
        return
    for key in store.live_commits():
        volume_id, _ = id_and_generation(key)
        try:
            if told.pop(volume_id, None) != store.read_commit(key):
                yield f"{store.path}: the table of volumes says another thing of {volume_id} than its commit; {anew}"
        except StoreError:
            continue  # said where the commits are checked
    for volume_id in told:
        yield f"{store.path}: the table of volumes names {volume_id}, which has no commit; {anew}"


def _recipe_problems(store: Store) -> Iterator[str]:
    """Every recipe, live or not, is named by the hash of its bytes."""
    keys = {f"recipes/{store.recipe_hash}.json", *store.storage.list("recipes")}
    for key in sorted(key for key in keys if key.endswith(".json")):
        try:
            if hashlib.sha256(store.storage.read(key)).hexdigest() != Path(key).stem:
                yield f"{store.path}: {key}: damaged: it is named by another hash than that of its bytes"
        except StoreError as error:
            yield str(error)


def _quarantine_problems(store: Store) -> Iterator[str]:
    for key in store.storage.list("quarantine"):
        if key.endswith(".json"):
            try:
                store.refusal(key)
            except StoreError as error:
                yield str(error)


def _group_problems(store: Store) -> Iterator[str]:
    """The groups between the root and an image are there for other Zarr readers, and all the same."""
    folders = {"volumes"}
    for key in store.live_commits():
        _, first, volume_id, _ = key.split("/")
        folders |= {f"volumes/{first}", f"volumes/{first}/{volume_id}"}
    for key in sorted(f"{folder}/{ZARR_DOCUMENT}" for folder in folders):
        try:
            if store.storage.read(key) != GROUP_DOCUMENT:
                yield f"{store.path}: {key}: expected a plain Zarr group, found something else; it was altered"
        except StoreError as error:
            yield str(error)


def _volume_problems(store: Store, volume: Volume) -> Iterator[str]:
    for check in (
        _document_problems,
        _image_problems,
        _array_problems,
        _shard_problems,
        _superpatch_problems,
        _map_problems,
    ):
        try:
            yield from check(store, volume)
        except StoreError as error:
            yield str(error)


def _document_problems(store: Store, volume: Volume) -> Iterator[str]:
    """Metadata, smaller levels and labels are byte for byte what was committed."""
    for name, crc in volume.documents.items():
        key = f"{volume.prefix}/{name}"
        try:
            if google_crc32c.value(store.storage.read(key)) != crc:
                yield f"{store.path}: {key}: damaged: its checksum is not the one in the commit"
        except StoreError as error:
            yield str(error)


def _array_problems(store: Store, volume: Volume) -> Iterator[str]:
    """The array must say what the commit says, or other Zarr readers would see something else."""
    tile = (volume.tile,) * 3
    shard = tuple(n * volume.tile for n in tiles_per_shard(volume.grid))
    expected = (volume.shape, "int16", AIR_HU, shard, tile)

    def found_in(metadata: Any) -> tuple[Any, ...]:
        outer, inner = metadata["chunk_grid"]["configuration"], metadata["codecs"][0]["configuration"]
        chunks = tuple(outer["chunk_shape"]), tuple(inner["chunk_shape"])
        return tuple(metadata["shape"]), metadata["data_type"], metadata["fill_value"], *chunks

    yield from _metadata_problems(store, f"{volume.prefix}/0/zarr.json", found_in, expected)


def _image_problems(store: Store, volume: Volume) -> Iterator[str]:
    """The OME-Zarr metadata must put voxels where the commit does, and name levels that the commit knows."""
    key = f"{volume.prefix}/{ZARR_DOCUMENT}"
    try:
        attributes = parsed_json(store.storage.read(key))["attributes"]
        found, levels = affine_of(attributes), level_paths(attributes)
        turned = ome_version(attributes) == OME_VERSION
    except _NOT_OURS as error:
        yield f"{store.path}: {key}: damaged ({error})"
        return
    expected = volume.affine
    if not turned:  # OME-Zarr 0.5 knows spacing and origin alone
        expected = straight(volume.spacing, volume.affine[:3, 3])
    if not np.allclose(found, expected, rtol=0, atol=_SAME_PLACE_MM):
        yield f"{store.path}: {key}: expected the affine {expected.tolist()}, found {found.tolist()}; it was altered"
    for path in levels:
        if f"{path}/{ZARR_DOCUMENT}" not in volume.documents:
            yield f"{store.path}: {key}: expected levels of the commit, found {path!r}; it was altered"


def _metadata_problems(
    store: Store, key: str, found_in: Callable[[Any], tuple[Any, ...]], expected: tuple[Any, ...]
) -> Iterator[str]:
    try:
        found = found_in(parsed_json(store.storage.read(key)))
    except _NOT_OURS as error:
        yield f"{store.path}: {key}: damaged ({error})"
        return
    if found != expected:
        yield f"{store.path}: {key}: expected {expected}, found {found}; it was altered"


def _shard_problems(store: Store, volume: Volume) -> Iterator[str]:
    """The shards' own indices must lead other Zarr readers to the same bytes as the commit does."""
    per_shard = tiles_per_shard(volume.grid)
    tables: dict[str, NDArray[np.uint64] | None] = {}
    for patch in volume.superpatches:
        where = f"{store.path}: volume {volume.volume_id}, superpatch {patch.index}"
        shard, inner = locate(patch.index, per_shard)
        key = f"{volume.prefix}/0/{shard}"
        try:
            if key not in tables:
                tables[key] = None  # a damaged index is one problem, not one per superpatch
                tables[key] = read_shard_index(store.storage, key, per_shard)
            if (table := tables[key]) is None:
                continue
            entry = shard_entry(table, inner, where)
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
    for name in (*MAPS, THUMBNAIL):
        try:
            if name == THUMBNAIL:
                read_thumbnail(store.storage, volume)
            else:
                load_map(store.storage, volume, name)
        except StoreError as error:
            yield str(error)
