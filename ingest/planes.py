"""Volumes slice by slice: in memory where they are small, in a temporary file where they are long.

Every step of ingest takes a few slices at a time of a volume ``[z, y, x]``. So memory does not grow with the length of
a scan, and where its voxels lie changes no result. The file has no name: it is gone when nothing refers to it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from maesil.ingest import limits
from maesil.store.urls import StorePlace
from maesil.types import Planes, Zyx

SLAB = 32
"""So many slices are worked on at a time."""
_TRANSPOSED = 128
"""So many where each slab means to read the whole volume."""


class TemporaryFile:
    """An open file without a name: it is gone when nothing refers to it any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def fileno(self) -> int:
        """Return its descriptor, which holds as long as this object lives."""
        return self._descriptor


class OnDisk:
    """A volume ``[z, y, x]`` in a file, from an offset (bytes) on.

    What indexing returns is a view of the file that cannot be written to: ``volume[z] = values`` writes.
    """

    def __init__(
        self, file: TemporaryFile, folder: Path, shape: tuple[int, ...], dtype: DTypeLike, offset: int = 0
    ) -> None:
        self.file, self.folder, self.offset = file, folder, offset
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._plane_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[z] for z in range(len(self)))

    def __getitem__(self, index: Any) -> NDArray[Any]:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(first, slice):
            return np.asarray(self._mapped(range(len(self))[first], 1)[(0, *rest)])
        start, stop, step = first.indices(len(self))
        if step != 1:
            raise IndexError("expected slices in their order")
        return self._mapped(start, max(0, stop - start))[(slice(None), *rest)]

    def __setitem__(self, index: int | slice, values: NDArray[Any]) -> None:
        slices = range(len(self))[index]
        start, count = (slices, 1) if isinstance(slices, int) else (slices.start, len(slices))
        whole = np.broadcast_to(values, (count, *self.shape[1:]) if isinstance(slices, range) else self.shape[1:])
        data = np.ascontiguousarray(whole, dtype=self.dtype).data.cast("B")
        at = self.offset + start * self._plane_bytes
        while data:  # not by the map: a full disk would then end the process and not the call
            written = os.pwrite(self.file.fileno(), data, at)
            data, at = data[written:], at + written

    def _mapped(self, start: int, count: int) -> NDArray[Any]:
        shape, size = (count, *self.shape[1:]), count * self._plane_bytes
        if not size:
            return np.zeros(shape, dtype=self.dtype)
        at = self.offset + start * self._plane_bytes
        before = at % mmap.ALLOCATIONGRANULARITY
        memory = mmap.mmap(self.file.fileno(), before + size, access=mmap.ACCESS_READ, offset=at - before)
        return np.frombuffer(memory, self.dtype, count=size // self.dtype.itemsize, offset=before).reshape(shape)


class Turned:
    """Another volume with its slices reversed, and each of them turned: nothing is copied."""

    def __init__(self, volume: OnDisk, swapped: bool, flip: tuple[bool, bool, bool]) -> None:
        self._volume, self._swapped, self._flip = volume, swapped, flip
        z, y, x = volume.shape
        self.shape, self.dtype, self.folder = (z, x, y) if swapped else (z, y, x), volume.dtype, volume.folder

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[z] for z in range(len(self)))

    def __getitem__(self, index: int | slice) -> NDArray[Any]:
        chosen = range(len(self))[index]
        if isinstance(chosen, int):
            return np.asarray(self[chosen : chosen + 1][0])
        upward = slice(len(self) - chosen.stop, len(self) - chosen.start) if self._flip[0] else index
        slices = self._volume[upward]
        if self._swapped:
            slices = slices.transpose(0, 2, 1)
        return slices[tuple(slice(None, None, -1 if f else 1) for f in self._flip)]

    def __setitem__(self, index: int | slice, values: NDArray[Any]) -> None:
        raise TypeError("expected a volume to write to, found a view of one")


def turned(volume: Planes, order: tuple[int, int, int], flip: tuple[bool, bool, bool]) -> Planes:
    """Return a volume with its axes in another order, and then some of them reversed: a view where it can be one."""
    if isinstance(volume, np.ndarray):
        transposed: Planes = volume.transpose(order)[tuple(slice(None, None, -1 if f else 1) for f in flip)]
        return transposed
    assert isinstance(volume, OnDisk)
    if order[0]:
        volume, order = _transposed(volume, order), (0, 1, 2)
    return Turned(volume, order[1] == 2, flip)


def _transposed(volume: OnDisk, order: tuple[int, int, int]) -> OnDisk:
    """Return a copy whose axes are in another order, the first of which is not that of the slices any more."""
    shape = tuple(volume.shape[axis] for axis in order)
    size = int(np.prod(shape, dtype=np.int64)) * volume.dtype.itemsize
    copy = OnDisk(temporary_file(volume.folder, size), volume.folder, shape, volume.dtype)
    for slab in slabs(len(copy), _TRANSPOSED):
        parts: list[slice] = [slice(None)] * 3
        parts[order[0]] = slab
        copy[slab] = strided(volume, (parts[0], parts[1], parts[2])).transpose(order)
    return copy


def scratch_folder(store: StorePlace) -> Path:
    """Return where temporary files of voxels go: into the folder of a store, which has room, or where TMPDIR says."""
    return store if isinstance(store, Path) else Path(tempfile.gettempdir())


def temporary_file(folder: Path, size: int = 0) -> TemporaryFile:
    """Return a file without a name in a folder, ``size`` bytes of zeros that take no space until they are written."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.ftruncate(file.fileno(), size)
        return TemporaryFile(os.dup(file.fileno()))


def zeros(shape: Zyx, dtype: DTypeLike, folder: Path | None) -> Planes:
    """Return a volume of zeros: in memory, or in a file in ``folder`` where it has more voxels than memory is for."""
    voxels = int(np.prod(shape, dtype=np.int64))
    if folder is None or voxels <= limits.WHOLE_VOXELS:
        return np.zeros(shape, dtype=dtype)
    return OnDisk(temporary_file(folder, voxels * np.dtype(dtype).itemsize), folder, shape, dtype)


def like(volume: Planes, dtype: DTypeLike) -> Planes:
    """Return zeros of the shape of a volume, where it lies: in memory, or in another file of the same folder."""
    if not isinstance(volume, OnDisk | Turned):
        return np.zeros(volume.shape, dtype=dtype)
    size = int(np.prod(volume.shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return OnDisk(temporary_file(volume.folder, size), volume.folder, volume.shape, dtype)


def each(function: Callable[..., NDArray[Any]], *volumes: Planes) -> Planes:
    """Return the mask whose slices are a function of those of some volumes."""
    mask = like(volumes[0], bool)
    for z, slices in enumerate(zip(*volumes, strict=True)):
        mask[z] = function(*slices)
    return mask


def count(mask: Planes) -> int:
    """Return how many voxels of a mask are True."""
    return sum(int(np.count_nonzero(plane)) for plane in mask)


def any_of(mask: Planes) -> bool:
    """Return whether a voxel of a mask is True."""
    return any(bool(plane.any()) for plane in mask)


def all_of(mask: Planes) -> bool:
    """Return whether every voxel of a mask is True."""
    return all(bool(plane.all()) for plane in mask)


def different_values(volume: Planes, mask: Planes, most: int) -> int:
    """Return how many values the voxels in a mask have, counted no further than one beyond ``most``."""
    found: set[float] = set()
    for plane, inside in zip(volume, mask, strict=True):
        if inside.any():
            found.update(np.unique(plane[inside])[: most + 1].tolist())
        if len(found) > most:
            return most + 1
    return len(found)


def every(volume: Planes, stride: int) -> Iterator[NDArray[Any]]:
    """Yield for each slice its part of ``volume.ravel()[::stride]``."""
    size = int(np.prod(volume.shape[1:], dtype=np.int64))
    for z, plane in enumerate(volume):
        yield plane.ravel()[-(z * size) % stride :: stride].copy()  # a view would keep its slice in memory


def strided(volume: Planes, parts: tuple[slice, slice, slice]) -> NDArray[Any]:
    """Return ``volume[parts]``; the parts may take steps."""
    planes = [volume[z][parts[1:]].copy() for z in range(*parts[0].indices(len(volume)))]
    return np.stack(planes) if planes else np.empty((0, 0, 0), dtype=volume.dtype)


def face(volume: Planes, axis: int, end: int) -> NDArray[Any]:
    """Return the outermost slice across an axis: the first (0) or the last (-1)."""
    return volume[range(len(volume))[end]] if axis == 0 else np.stack([plane.take(end, axis - 1) for plane in volume])


def slabs(length: int, size: int = SLAB) -> Iterator[slice]:
    """Yield slabs of so many slices, the last one perhaps thinner."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
