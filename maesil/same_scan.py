"""Which volumes are the same scan: resampled, renamed or converted, and so in two patient groups.

A scan that is in the training split under one name and in the test split under another makes every score worthless.
Thumbnails of the body, aligned at its centre of mass, are compared, so that neither origin nor spacing matters. A
thumbnail is written with its volume; the index holds all of a store in one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maesil.commit import Volume
from maesil.errors import StoreError
from maesil.parquet import read_parquet, to_parquet
from maesil.small_array import read_small_array
from maesil.storage import Storage
from maesil.store import ZARR_DOCUMENT, Store
from maesil.types import MAP_CELL, HuArray, MapArray, Spacing

THUMBNAILS_KEY = "index/thumbnails.parquet"
THUMBNAIL = "thumbnail"
"""Name of the array of an attempt that holds its thumbnail."""
THUMBNAIL_MM = 8.0
SAME_ABOVE = 0.99
"""Correlation above which two thumbnails are of one scan (ours): one scan in two files reached 0.9986, others 0.70."""

_TISSUE_ABOVE_HU = -400
_WINDOW = (-1000, 1000)
_LARGEST_SHIFT = 1
_SAME_EXTENT = 2
_SKETCH = 6
_SKETCH_ABOVE = 0.95
_ROWS_AT_ONCE = 256
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


def patients(stores: Sequence[Store]) -> dict[str, str]:
    """Return, for each patient group of the stores, the group that stands for it once groups sharing a scan are one."""
    volumes = [volume for store in stores for volume in store.volumes()]
    found = [thumbnail for store in stores for thumbnail in thumbnails(store).values()]
    return merge_groups([volume.group for volume in volumes], found)


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


def merge_groups(groups: Sequence[str], found: Sequence[Thumbnail]) -> dict[str, str]:
    """Return the leader of each patient group; ``groups`` and ``found`` have an entry a volume."""
    leader = {group: group for group in groups}

    def lead(group: str) -> str:
        while leader[group] != group:
            group = leader[group]
        return group

    for i, j in _alike(found):
        one, other = lead(groups[i]), lead(groups[j])
        if one != other and same_scan(found[i], found[j]):
            first, second = sorted((one, other))
            leader[second] = first
    return {group: lead(group) for group in leader}


def _alike(found: Sequence[Thumbnail]) -> Iterator[tuple[int, int]]:
    """Yield the pairs worth comparing in full: alike in extent, and as sketches of 6^3 cells of the bounding box.

    Sketches are compared by matrix products, so that tens of thousands of volumes take seconds.
    """
    numbers = [n for n, thumbnail in enumerate(found) if thumbnail.size]
    if not numbers:
        return
    sketches = np.stack([_sketch(found[n]) for n in numbers])
    extents = np.array([found[n].shape for n in numbers], dtype=np.int16)
    for start in range(0, len(numbers), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        near = np.abs(extents[rows, None] - extents[None]).max(axis=2) <= _SAME_EXTENT
        for i, j in np.argwhere(near & (sketches[rows] @ sketches.T > _SKETCH_ABOVE)):
            if start + i < j:
                yield numbers[start + i], numbers[j]


def _sketch(thumbnail: Thumbnail) -> NDArray[np.float32]:
    values = _averaged(thumbnail, [np.linspace(0, n, _SKETCH + 1) for n in thumbnail.shape]).ravel()
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


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


def thumbnail(hu: HuArray, body: MapArray, spacing: Spacing) -> Thumbnail:
    """Return the thumbnail of a volume: int16 HU ``[z, y, x]``, its body map, and its spacing (mm)."""
    cells = _box(_planes(body > 0))
    if cells is None:
        return np.zeros((0, 0, 0), np.uint8)
    near = hu[tuple(slice(part.start * MAP_CELL, part.stop * MAP_CELL) for part in cells)]
    masses = _masses(near, body[cells] > 0)
    box = _box(masses)
    if box is None:
        return np.zeros((0, 0, 0), np.uint8)
    low, high = _WINDOW
    edges = [_edges(mass[part], THUMBNAIL_MM / mm) for mass, part, mm in zip(masses, box, spacing, strict=True)]
    means = _averaged(near[box], edges)
    return np.asarray(np.rint((means - low) * (255 / (high - low))), dtype=np.uint8)


def _planes(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], ...]:
    """Return how much is True in each plane across each axis."""
    return mask.sum(axis=(1, 2)), mask.sum(axis=(0, 2)), mask.sum(axis=(0, 1))


def _masses(hu: HuArray, body: NDArray[np.bool_]) -> tuple[NDArray[np.int64], ...]:
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


def same_scan(a: Thumbnail, b: Thumbnail) -> bool:
    """Return whether two thumbnails correlate above `SAME_ABOVE`, shifted against each other by up to one cell."""
    if not a.size or not b.size or np.abs(np.subtract(a.shape, b.shape)).max() > _SAME_EXTENT:
        return False
    steps = sorted(range(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1), key=abs)  # most copies lie where they lay
    return any(_correlation(a, b, shift) > SAME_ABOVE for shift in product(steps, repeat=3))


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


def _averaged(values: NDArray[Any], edges: Sequence[NDArray[np.float64]]) -> NDArray[np.float32]:
    """Return means between the borders given along each axis; voxels are shared out between cells.

    What lies beyond the window of HU counts as its end.
    """
    means = values
    for axis, borders in enumerate(edges):
        means = np.moveaxis(_averaged_planes(np.moveaxis(means, axis, 0), borders), 0, axis)
    return means


def _averaged_planes(values: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.float32]:
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


def _correlation(a: Thumbnail, b: Thumbnail, shift: tuple[int, ...]) -> float:
    parts_a, parts_b = [], []
    for n, m, s in zip(a.shape, b.shape, shift, strict=True):
        length = min(n - max(s, 0), m - max(-s, 0))
        if length < 2:
            return 0.0
        parts_a.append(slice(max(s, 0), max(s, 0) + length))
        parts_b.append(slice(max(-s, 0), max(-s, 0) + length))
    x, y = (part.astype(np.float64).ravel() for part in (a[tuple(parts_a)], b[tuple(parts_b)]))
    x -= x.mean()
    y -= y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else 0.0
