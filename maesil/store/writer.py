"""Writing one volume: an OME-Zarr image whose inner chunks are superpatches, and the maps beside it.

The folder written is an *attempt*, which nothing refers to until it is committed.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from maesil.errors import StoreError
from maesil.geometry import Affine, spacing_of
from maesil.store.commit import attempt_prefix, volume_prefix
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
from maesil.store.store import GROUP_DOCUMENT, ZARR_DOCUMENT
from maesil.store.thumbnails import THUMBNAIL, THUMBNAIL_MM, Thumbnail, thumbnail
from maesil.types import AIR_HU, MAP_CELL, HuArray, MapArray, Planes, Zyx

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
    storage: Storage, volume_id: str, attempt: str, image: Image, *, tile: int, codec: str, threads: int = 1
) -> tuple[tuple[Superpatch, ...], dict[str, int]]:
    """Write, sync and read back one attempt; return its superpatches, and the crc32c of its Zarr documents.

    Superpatches are encoded, and compared with what was written, on as many ``threads``. `StoreError` if what was read
    back is not what was written. An error leaves nothing of the attempt behind: the disk may be full.
    """
    prefix = attempt_prefix(volume_id, attempt)
    for folder in (f"volumes/{volume_id[:2]}", volume_prefix(volume_id)):
        storage.put_new(f"{folder}/{ZARR_DOCUMENT}", GROUP_DOCUMENT)
    tiles = _Tiles(storage, prefix, image, tile, codec)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="maesil-writer") as pool:
            superpatches = _write(tiles, _ome_attributes(volume_id, image.affine), pool)
        written = [key for key in storage.list(prefix) if key.endswith(f"/{ZARR_DOCUMENT}")]
        documents = {key.removeprefix(f"{prefix}/"): google_crc32c.value(storage.read(key)) for key in written}
    except BaseException:
        storage.remove(prefix)
        raise
    return superpatches, documents


def _write(tiles: _Tiles, attributes: dict[str, Any], pool: ThreadPoolExecutor) -> tuple[Superpatch, ...]:
    storage, prefix, image = tiles.storage, tiles.prefix, tiles.image
    group = zarr.create_group(storage.zarr(prefix, read_only=False), attributes=attributes)
    tiles.create(group)
    small = pool.submit(thumbnail, image.hu, image.body, spacing_of(image.affine))
    tiles.write(pool)
    _write_maps(group, image, small.result())
    with storage.syncing(prefix):  # the disk is at work meanwhile
        return tuple(tiles.read_back(pool))


class _Tiles:
    """The superpatches of one attempt: written on a pool of threads, and read back on it."""

    def __init__(self, storage: Storage, prefix: str, image: Image, edge: int, codec: str) -> None:
        self.storage, self.prefix, self.image = storage, prefix, image
        self._edge, self._codec = edge, codec
        z, y, x = (-(-n // edge) for n in image.shape)
        self._per_shard = tiles_per_shard((z, y, x))
        self._places = {index: locate(index, self._per_shard) for index in product(range(z), range(y), range(x))}
        self._shards = sorted({shard for shard, _ in self._places.values()})
        self._scratch = _Scratch(edge)

    def create(self, group: zarr.Group) -> None:
        """Write the metadata of the array."""
        group.create_array(
            "0",
            shape=self.image.shape,
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
            self.storage.put_parts(f"{self.prefix}/0/{shard}", shard_parts(self._per_shard, encoded))

    def read_back(self, pool: ThreadPoolExecutor) -> list[Superpatch]:
        """Return all superpatches as they were found in the files; `StoreError` if one is not what was written."""
        tables = {s: read_shard_index(self.storage, f"{self.prefix}/0/{s}", self._per_shard) for s in self._shards}
        return list(pool.map(lambda index: self._read_back(index, tables), self._places))

    def _encode(self, index: Zyx) -> tuple[bytes, bytes]:
        np.copyto(self._scratch.decoded, self._voxels(index))
        return encode(self._scratch.decoded, self._codec)

    def _read_back(self, index: Zyx, tables: dict[str, NDArray[np.uint64]]) -> Superpatch:
        shard, inner = self._places[index]
        key = f"{self.prefix}/0/{shard}"
        where = f"{self.storage.root}: {self.prefix}, superpatch {index}"
        offset, length = shard_entry(tables[shard], inner, where)
        encoded, found = np.frombuffer(self.storage.read_range(key, offset, length), np.uint8), self._scratch.decoded
        crc = int.from_bytes(encoded[-4:], "little")
        check_and_decode(encoded, crc, self._codec, found, where)
        if not np.array_equal(found, self._voxels(index)):
            raise StoreError(f"{where}: read back other voxels than were written; check disk and memory")
        return Superpatch(index, key, offset, length, crc, *_shares(self.image, index, self._edge, found))

    def _voxels(self, index: Zyx) -> HuArray:
        """Return a superpatch, air beyond the volume; it holds until this thread asks for the next."""
        part: HuArray = self.image.hu[tuple(slice(i * self._edge, (i + 1) * self._edge) for i in index)]
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


def _write_maps(group: zarr.Group, image: Image, small: Thumbnail) -> None:
    cells = {"cell_voxels": MAP_CELL, "unit": "share of the cell, 0 to 255"}
    _write_map(group, "valid", image.valid, cells)
    _write_map(group, "body", image.body, cells)
    if small.size:  # without a body there is nothing to make a thumbnail of
        _write_map(group, THUMBNAIL, small, {"cell_mm": THUMBNAIL_MM, "unit": "windowed HU, 0 to 255"})


def _write_map(group: zarr.Group, name: str, cells: MapArray, attributes: dict[str, Any]) -> None:
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


def _shares(image: Image, index: Zyx, tile: int, hu: HuArray) -> tuple[float, float, float]:
    """Return the shares of valid and body voxels in a superpatch, and of air among the valid ones."""
    edge = tile // MAP_CELL
    cells = tuple(slice(i * edge, (i + 1) * edge) for i in index)
    valid, body = (float(m[cells].sum(dtype=np.int64)) / (255 * edge**3) for m in (image.valid, image.body))
    # Voxels outside the scan are air too; they are taken off again by their share.
    air = np.count_nonzero(hu <= _AIR_BELOW_HU) / hu.size - (1 - valid)
    return round(valid, 6), round(body, 6), round(min(1.0, max(0.0, air / valid)), 6) if valid else 0.0


def _ome_attributes(volume_id: str, affine: Affine) -> dict[str, object]:
    """Return the OME-Zarr 0.5 ``multiscales`` metadata (spacing and origin only: 0.5 knows no rotation)."""
    origin = [float(affine[row, 3]) for row in (2, 1, 0)]
    transformations = [
        {"type": "scale", "scale": list(spacing_of(affine))},
        {"type": "translation", "translation": origin},
    ]
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    scales = {
        "name": volume_id,
        "axes": axes,
        "datasets": [{"path": "0", "coordinateTransformations": transformations}],
    }
    return {"ome": {"version": "0.5", "multiscales": [scales]}}
