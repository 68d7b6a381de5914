"""A small picture of the body of each volume, by which copies of a scan are found (`maesil.store.duplicates`).

A thumbnail is aligned at the body's centre of mass, so that neither origin nor spacing matters. It is written with its
volume; the index holds all of a store in one table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maesil.errors import StoreError
from maesil.parquet import read_parquet, to_parquet
from maesil.store.arrays import read_small_array
from maesil.store.records import Volume
from maesil.store.storage import Storage
from maesil.store.store import ZARR_DOCUMENT, Store
from maesil.types import MAP_CELL, HuArray, MapArray, Planes, Spacing

THUMBNAILS_KEY = "index/thumbnails.parquet"
THUMBNAIL = "thumbnail"
"""Name of the array of an attempt that holds its thumbnail."""
THUMBNAIL_MM = 8.0

_TISSUE_ABOVE_HU = -400
_WINDOW = (-1000, 1000)
_THREADS = 4
_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("volume_id", "attempt")),
        *(pa.field(name, pa.int32(), nullable=False) for name in "zyx"),
        pa.field("values", pa.binary(), nullable=False),
    ]
)

Thumbnail = NDArray[np.uint8]
"""Mean windowed HU of 8 mm cells, 0..255 for -1000..1000 HU, of the body's bounding box ``[z, y, x]``."""


def thumbnails(store: Store) -> dict[str, Thumbnail]:
    """Return the thumbnail of every live volume by id, in the order of ids: from the index, or from the volumes."""
    volumes, kept = store.volumes(), _kept(store)
    missing = [volume for volume in volumes if (volume.volume_id, volume.attempt) not in kept]
    with ThreadPoolExecutor(_THREADS) as pool:
        made = dict(
            zip((v.volume_id for v in missing), pool.map(lambda v: _readable(store.storage, v), missing), strict=True)
        )
    return {v.volume_id: made[v.volume_id] if v.volume_id in made else kept[v.volume_id, v.attempt] for v in volumes}


def thumbnails_table(volumes: Sequence[Volume], found: Mapping[str, Thumbnail]) -> bytes:
    """Return the Parquet table of thumbnails that the index keeps."""
    rows = [
        {
            "volume_id": volume.volume_id,
            "attempt": volume.attempt,
            **dict(zip("zyx", found[volume.volume_id].shape, strict=True)),
            "values": found[volume.volume_id].tobytes(),
        }
        for volume in volumes
        if volume.volume_id in found
    ]
    return to_parquet(pa.Table.from_pylist(rows, schema=_SCHEMA))


def _kept(store: Store) -> dict[tuple[str, str], Thumbnail]:
    try:
        table = read_parquet(store.storage.read(THUMBNAILS_KEY)).select(_SCHEMA.names).cast(_SCHEMA).to_pylist()
    except (StoreError, pa.ArrowException, OSError, KeyError):
        return {}
    return {
        (row["volume_id"], row["attempt"]): np.frombuffer(row["values"], np.uint8).reshape([row[a] for a in "zyx"])
        for row in table
    }


def read_thumbnail(storage: Storage, volume: Volume) -> Thumbnail:
    """Return the thumbnail written with a volume, an empty one where there is no body; `StoreError` on damage."""
    if f"{THUMBNAIL}/{ZARR_DOCUMENT}" not in volume.documents:
        return np.zeros((0, 0, 0), np.uint8)
    return read_small_array(storage, volume, THUMBNAIL)


def _readable(storage: Storage, volume: Volume) -> Thumbnail:
    """Return a volume's thumbnail, an empty one where it is damaged: that is for `verify` to tell."""
    try:
        return read_thumbnail(storage, volume)
    except StoreError:
        return np.zeros((0, 0, 0), np.uint8)


class _Box:
    """A box of a volume, read layer by layer."""

    def __init__(self, hu: Planes, box: tuple[slice, ...]) -> None:
        self._hu, (self._z, *self._plane) = hu, (slice(*part.indices(n)) for part, n in zip(box, hu.shape, strict=True))
        self.shape = tuple(part.stop - part.start for part in (self._z, *self._plane))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, layer: slice) -> HuArray:
        start, stop, _ = layer.indices(len(self))
        found: HuArray = self._hu[(slice(self._z.start + start, self._z.start + stop), *self._plane)]
        return found

    def box(self, inner: tuple[slice, ...]) -> _Box:
        """Return a box within this one."""
        outer = (self._z, *self._plane)
        return _Box(
            self._hu, tuple(slice(o.start + i.start, o.start + i.stop) for o, i in zip(outer, inner, strict=True))
        )


def thumbnail(hu: Planes, body: MapArray, spacing: Spacing) -> Thumbnail:
    """Return the thumbnail of a volume: int16 HU ``[z, y, x]``, its body map, and its spacing (mm)."""
    cells = _box(_planes(body > 0))
    if cells is None:
        return np.zeros((0, 0, 0), np.uint8)
    near = _Box(hu, tuple(slice(part.start * MAP_CELL, part.stop * MAP_CELL) for part in cells))
    masses = _masses(near, body[cells] > 0)
    box = _box(masses)
    if box is None:
        return np.zeros((0, 0, 0), np.uint8)
    edges = [_edges(mass[part], THUMBNAIL_MM / mm) for mass, part, mm in zip(masses, box, spacing, strict=True)]
    means = averaged(near.box(box), edges)
    return np.asarray(np.rint(thumbnail_value(means)), dtype=np.uint8)


def thumbnail_value(hu: Any) -> Any:
    """Return the value of a cell of some HU, a number or an array, not yet rounded."""
    low, high = _WINDOW
    return (hu - low) * (255 / (high - low))


def _planes(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], ...]:
    """Return how much is True in each plane across each axis."""
    return mask.sum(axis=(1, 2)), mask.sum(axis=(0, 2)), mask.sum(axis=(0, 1))


def _masses(hu: _Box, body: NDArray[np.bool_]) -> tuple[NDArray[np.int64], ...]:
    """Return the voxels of tissue, in cells of body, in each plane across each axis."""
    along_z = np.zeros(len(hu), dtype=np.int64)
    y, x = hu.shape[1:]
    columns = np.zeros((y, x), dtype=np.int64)  # along z
    for n, cells in enumerate(body):  # a layer of cells stays in the processor's cache
        layer = slice(n * MAP_CELL, (n + 1) * MAP_CELL)
        tissue = hu[layer] > _TISSUE_ABOVE_HU
        tissue &= cells.repeat(MAP_CELL, axis=0).repeat(MAP_CELL, axis=1)[:y, :x]
        along_z[layer] = [np.count_nonzero(plane) for plane in tissue]
        columns += tissue.sum(axis=0, dtype=np.uint8)  # at most 8: no wider type is needed, and none is as fast
    return along_z, columns.sum(axis=1), columns.sum(axis=0)


def _box(planes: tuple[NDArray[np.int64], ...]) -> tuple[slice, ...] | None:
    """Return the bounding box of what the planes across each axis count, None where they count nothing."""
    if not planes[0].any():
        return None
    filled = [np.flatnonzero(plane) for plane in planes]
    return tuple(slice(int(at[0]), int(at[-1]) + 1) for at in filled)


def _edges(mass: NDArray[np.int64], factor: float) -> NDArray[np.float64]:
    """Return the borders of cells of ``factor`` voxels along an axis, one of them at the tissue's centre of mass.

    A bounding box moves by a voxel with every resampling; the centre of mass hardly moves.
    """
    length = len(mass)
    centre = float(mass @ (np.arange(length) + 0.5) / mass.sum())
    below, above = int(centre / factor), int((length - centre) / factor)
    if not below + above:
        return np.array([0.0, length])
    return np.asarray(centre + factor * np.arange(-below, above + 1), dtype=np.float64)


def averaged(values: NDArray[Any] | _Box, edges: Sequence[NDArray[np.float64]]) -> NDArray[np.float32]:
    """Return means between the borders given along each axis; voxels are shared out between cells.

    What lies beyond the window of HU counts as its end.
    """
    means = _averaged_planes(values, edges[0])
    for axis, borders in enumerate(edges[1:], start=1):
        means = np.moveaxis(_averaged_planes(np.moveaxis(means, axis, 0), borders), 0, axis)
    return means


def _averaged_planes(values: NDArray[Any] | _Box, edges: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return means of planes between borders along the first axis.

    A layer of cells at a time, into memory that is used again: a float copy of a whole scan costs more than the rest.
    No matrix products: after one, the threads of a linear algebra library go on to spin.
    """
    averaging = _averaging(len(values), edges)
    low, high = (np.float32(end) for end in _WINDOW)
    planes = np.empty((np.count_nonzero(averaging, axis=1).max(), *values.shape[1:]), dtype=np.float32)
    means = np.empty((len(averaging), *values.shape[1:]), dtype=np.float32)
    for mean, shares in zip(means, averaging, strict=True):
        covered = np.flatnonzero(shares)
        clipped = np.clip(values[covered[0] : covered[-1] + 1], low, high, out=planes[: len(covered)])
        np.einsum("n,n...->...", shares[covered], clipped, out=mean)
    return means


def _averaging(length: int, edges: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the matrix ``[cells, voxels]`` whose rows average the voxels that a cell covers."""
    first, last = edges[:-1, None], edges[1:, None]
    at = np.arange(length)
    covered = np.clip(np.minimum(at + 1, last) - np.maximum(at, first), 0, 1)
    return np.asarray(covered / covered.sum(axis=1, keepdims=True), dtype=np.float32)
