"""Writing one volume: an OME-Zarr image whose inner chunks are superpatches, and the maps beside it.

The folder written is an *attempt*, which nothing refers to until it is committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from maesil.errors import StoreError
from maesil.geometry import Affine, spacing_of
from maesil.store.arrays import decoded_chunk
from maesil.store.commit import attempt_prefix, volume_prefix
from maesil.store.ome import image_attributes
from maesil.store.pyramid import Level, Room, levels_below, smaller
from maesil.store.reader import MAPS
from maesil.store.records import Superpatch
from maesil.store.storage import Storage
from maesil.store.store import GROUP_DOCUMENT, ZARR_DOCUMENT
from maesil.store.thumbnails import THUMBNAIL, THUMBNAIL_MM, Thumbnail, thumbnail
from maesil.store.tiles import OTHER_BYTES, Attempt, Tiles, read_back_metadata
from maesil.types import MAP_CELL, HuArray, MapArray, Planes, Zyx

_AIR_BELOW_HU = -900


@dataclass(frozen=True)
class Image:
    """A volume ready to be written: canonical axes, final grid."""

    hu: Planes
    """int16 HU ``[z, y, x]``, -1024 wherever it is not valid."""
    affine: Affine
    valid: MapArray
    """uint8 share, 0..255, of each 8^3 cell inside the scan: ``[ceil(z/8), ceil(y/8), ceil(x/8)]``."""
    body: MapArray
    """The same for the patient's body."""

    @property
    def shape(self) -> Zyx:
        """Voxels along z, y, x."""
        z, y, x = self.hu.shape
        return z, y, x


def write_attempt(
    storage: Storage,
    volume_id: str,
    attempt: str,
    image: Image,
    *,
    tile: int,
    codec: str,
    oriented: bool = True,
    room: Room = np.zeros,
    threads: int = 1,
) -> tuple[tuple[Superpatch, ...], dict[str, int]]:
    """Write, sync and read back one attempt; return its superpatches, and the crc32c of what lies beside them.

    ``oriented``: whether S, P, L name the directions of the patient; they do not for an animal on four legs. ``room``
    is where the smaller levels are put until they are written. Superpatches are encoded, and compared with what was
    written, on as many ``threads``. `StoreError` if what was read
    back is not what was written. An error leaves nothing of the attempt behind: the disk may be full.
    """
    prefix, spacing = attempt_prefix(volume_id, attempt), spacing_of(image.affine)
    attributes = image_attributes(volume_id, image.affine, levels_below(image.shape, spacing), oriented=oriented)
    for folder in (f"volumes/{volume_id[:2]}", volume_prefix(volume_id)):
        storage.put_new(f"{folder}/{ZARR_DOCUMENT}", GROUP_DOCUMENT)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="maesil-writer") as pool:
            superpatches = _write(Attempt(storage, prefix, tile, codec), image, attributes, room, pool)
        documents = documents_of(storage, prefix)
    except BaseException:
        storage.remove(prefix)
        raise
    return superpatches, documents


def documents_of(storage: Storage, prefix: str) -> dict[str, int]:
    """Return the crc32c of all that no record of superpatches vouches for: metadata, smaller levels, labels."""
    found = {key.removeprefix(f"{prefix}/"): key for key in storage.list(prefix)}
    vouched = ("0/c/", *(f"{name}/c/" for name in (*MAPS, THUMBNAIL)))
    return {name: google_crc32c.value(storage.read(key)) for name, key in found.items() if not name.startswith(vouched)}


def _write(
    attempt: Attempt, image: Image, attributes: dict[str, Any], room: Room, pool: ThreadPoolExecutor
) -> tuple[Superpatch, ...]:
    spacing = spacing_of(image.affine)
    group = zarr.create_group(attempt.storage.zarr(attempt.prefix, read_only=False), attributes=attributes)
    small = pool.submit(thumbnail, image.hu, image.body, spacing)
    below = pool.submit(smaller, image.hu, image.valid, spacing, room)
    voxels = Tiles(attempt, "0", image.hu)
    voxels.create(group)
    voxels.write(pool)
    maps = _write_maps(group, image, small.result())
    written = _write_levels(attempt, group, below.result(), pool)
    with attempt.storage.syncing(attempt.prefix):  # the disk is at work meanwhile
        read_back_metadata(attempt.storage, attempt.prefix, group)
        for array, cells in maps:
            _read_back_map(attempt.storage, attempt.prefix, array, cells)
        for level in written:
            level.read_back(pool)
        return tuple(voxels.read_back(pool, partial(_shares, image)))


def write_beside(attempt: Attempt, attributes: dict[str, Any], levels: Sequence[tuple[Level, Planes]]) -> None:
    """Write metadata and levels beside voxels that are there, and read them back."""
    group = zarr.create_group(attempt.storage.zarr(attempt.prefix, read_only=False), attributes=attributes)
    with ThreadPoolExecutor(1) as pool:
        for level in _write_levels(attempt, group, levels, pool):
            level.read_back(pool)
    read_back_metadata(attempt.storage, attempt.prefix, group)


def _write_levels(
    attempt: Attempt, group: zarr.Group, levels: Sequence[tuple[Level, Planes]], pool: ThreadPoolExecutor
) -> list[Tiles]:
    """Write the levels below level 0 as the arrays ``1``, ``2``...; return them, to be read back."""
    written = [Tiles(attempt, str(number), hu) for number, (_, hu) in enumerate(levels, start=1)]
    for level in written:
        level.create(group)
        level.write(pool)
    return written


def _write_maps(group: zarr.Group, image: Image, small: Thumbnail) -> list[tuple[zarr.Array[Any], MapArray]]:
    """Write the small arrays beside the voxels; return them, to be read back."""
    cells = {"cell_voxels": MAP_CELL, "unit": "share of the cell, 0 to 255"}
    written = [_write_map(group, "valid", image.valid, cells), _write_map(group, "body", image.body, cells)]
    if small.size:  # without a body there is nothing to make a thumbnail of
        shown = {"cell_mm": THUMBNAIL_MM, "unit": "windowed HU, 0 to 255"}
        written.append(_write_map(group, THUMBNAIL, small, shown))
    return written


def _write_map(
    group: zarr.Group, name: str, cells: MapArray, attributes: dict[str, Any]
) -> tuple[zarr.Array[Any], MapArray]:
    array = group.create_array(
        name,
        shape=cells.shape,
        chunks=cells.shape,
        dtype="uint8",
        fill_value=0,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        dimension_names=("z", "y", "x"),
        attributes=attributes,
        config={"write_empty_chunks": True},
    )
    array[...] = cells
    return array, cells


def _read_back_map(storage: Storage, prefix: str, array: zarr.Array[Any], cells: MapArray) -> None:
    """`StoreError` unless metadata and cells of an array are found as they were written."""
    key = f"{read_back_metadata(storage, prefix, array)}/c/0/0/0"
    try:
        same = np.array_equal(decoded_chunk(storage.read(key)), cells.ravel())
    except (ValueError, RuntimeError) as error:
        raise StoreError(f"{storage.root}/{key}: read back {OTHER_BYTES} ({error})") from error
    if not same:
        raise StoreError(f"{storage.root}/{key}: read back {OTHER_BYTES}")


def _shares(image: Image, index: Zyx, hu: HuArray) -> tuple[float, float, float]:
    """Return the shares of valid and body voxels in a superpatch, and of air among the valid ones."""
    edge = len(hu) // MAP_CELL
    cells = tuple(slice(i * edge, (i + 1) * edge) for i in index)
    valid, body = (float(m[cells].sum(dtype=np.int64)) / (255 * edge**3) for m in (image.valid, image.body))
    # Voxels outside the scan are air too; they are taken off again by their share.
    air = np.count_nonzero(hu <= _AIR_BELOW_HU) / hu.size - (1 - valid)
    return round(valid, 6), round(body, 6), round(min(1.0, max(0.0, air / valid)), 6) if valid else 0.0
