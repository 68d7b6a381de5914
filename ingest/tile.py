"""Writing one volume: an OME-Zarr image whose inner chunks are superpatches, and the maps beside it.

The folder written is an *attempt*, which nothing refers to until it is committed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from maesil.commit import Superpatch, attempt_prefix, volume_prefix
from maesil.errors import StoreError
from maesil.geometry import Affine, spacing_of
from maesil.same_scan import THUMBNAIL, THUMBNAIL_MM, thumbnail
from maesil.shard import compressors, decode_superpatch, locate, read_shard_index, shard_entry, tiles_per_shard
from maesil.storage import Storage
from maesil.store import GROUP_DOCUMENT, ZARR_DOCUMENT
from maesil.types import AIR_HU, MAP_CELL, HuArray, MapArray, Zyx

_AIR_BELOW_HU = -900


@dataclass(frozen=True)
class Image:
    """A volume ready to be written: canonical axes, final grid."""

    hu: HuArray
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
    storage: Storage, volume_id: str, attempt: str, image: Image, *, tile: int, codec: str
) -> tuple[tuple[Superpatch, ...], dict[str, int]]:
    """Write, sync and read back one attempt; return its superpatches, and the crc32c of its Zarr documents.

    `StoreError` if what was read back is not what was written.
    """
    prefix = attempt_prefix(volume_id, attempt)
    for folder in (f"volumes/{volume_id[:2]}", volume_prefix(volume_id)):
        storage.put_new(f"{folder}/{ZARR_DOCUMENT}", GROUP_DOCUMENT)
    group = zarr.create_group(
        storage.zarr(prefix, read_only=False), attributes=_ome_attributes(volume_id, image.affine)
    )
    _write_hu(group, image, tile, codec)
    cells = {"cell_voxels": MAP_CELL, "unit": "share of the cell, 0 to 255"}
    small = thumbnail(image.hu, image.body, spacing_of(image.affine))
    for name, values, attributes in (
        ("valid", image.valid, cells),
        ("body", image.body, cells),
        (THUMBNAIL, small, {"cell_mm": THUMBNAIL_MM, "unit": "windowed HU, 0 to 255"}),
    ):
        if values.size:  # without a body there is nothing to make a thumbnail of
            _write_map(group, name, values, attributes)
    storage.sync(prefix)
    written = [key for key in storage.list(prefix) if key.endswith(f"/{ZARR_DOCUMENT}")]
    documents = {key.removeprefix(f"{prefix}/"): google_crc32c.value(storage.read(key)) for key in written}
    return tuple(_read_back(storage, prefix, image, tile, codec)), documents


def _write_hu(group: zarr.Group, image: Image, tile: int, codec: str) -> None:
    grid = _grid(image.shape, tile)
    array = group.create_array(
        "0",
        shape=image.shape,
        chunks=(tile,) * 3,
        shards=tuple(n * tile for n in tiles_per_shard(grid)),
        dtype="int16",
        fill_value=AIR_HU,
        compressors=compressors(codec),
        dimension_names=("z", "y", "x"),
        config={"write_empty_chunks": True},  # an absent chunk must always mean damage
    )
    array[...] = image.hu


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


def _read_back(storage: Storage, prefix: str, image: Image, tile: int, codec: str) -> list[Superpatch]:
    grid = _grid(image.shape, tile)
    per_shard = tiles_per_shard(grid)
    tables = {}
    found = np.empty((tile,) * 3, dtype=np.int16)
    superpatches = []
    for index in product(range(grid[0]), range(grid[1]), range(grid[2])):
        shard, inner = locate(index, per_shard)
        key = f"{prefix}/0/{shard}"
        if key not in tables:
            tables[key] = read_shard_index(storage, key, per_shard)
        where = f"{storage.root}: {prefix}, superpatch {index}"
        offset, length = shard_entry(tables[key], inner, where)
        crc = int.from_bytes(storage.read_range(key, offset + length - 4, 4), "little")
        expected = _padded_tile(image.hu, index, tile)
        patch = Superpatch(index, key, offset, length, crc, *_shares(image, index, tile, expected))
        decode_superpatch(storage, patch, codec, found, where)
        if not np.array_equal(found, expected):
            raise StoreError(f"{where}: read back other voxels than were written; check disk and memory")
        superpatches.append(patch)
    return superpatches


def _shares(image: Image, index: Zyx, tile: int, hu: HuArray) -> tuple[float, float, float]:
    """Return the shares of valid and body voxels in a superpatch, and of air among the valid ones."""
    edge = tile // MAP_CELL
    cells = tuple(slice(i * edge, (i + 1) * edge) for i in index)
    valid, body = (float(m[cells].sum(dtype=np.int64)) / (255 * edge**3) for m in (image.valid, image.body))
    # Voxels outside the scan are air too; they are taken off again by their share.
    air = np.count_nonzero(hu <= _AIR_BELOW_HU) / hu.size - (1 - valid)
    return round(valid, 6), round(body, 6), round(min(1.0, max(0.0, air / valid)), 6) if valid else 0.0


def _padded_tile(hu: HuArray, index: Zyx, tile: int) -> HuArray:
    part = hu[tuple(slice(i * tile, (i + 1) * tile) for i in index)]
    if part.shape == (tile,) * 3:
        return part
    out = np.full((tile,) * 3, AIR_HU, dtype=np.int16)
    out[tuple(slice(0, n) for n in part.shape)] = part
    return out


def _grid(shape: Zyx, tile: int) -> Zyx:
    z, y, x = (-(-n // tile) for n in shape)
    return z, y, x


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
