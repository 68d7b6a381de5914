"""Segmentations of the volumes of a store: found by volume id, placed in world space, nearest neighbour on its grid.

A folder of labels holds, for each labelled volume, ``VOLUME_ID.nii.gz`` (or ``.nii``; whole numbers, 0 = background),
or a folder ``VOLUME_ID/`` of binary masks whose file names are the classes. Their own affines say where they lie, so
they may have the grid of the source or that of the store. ``classes.json`` may name the numbers: ``{"1": "liver"}``.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from maesil.documents import parsed_json
from maesil.errors import NoInputError, UsageError
from maesil.geometry import Affine, from_nifti
from maesil.store.records import Volume
from maesil.text import counted
from maesil.types import Zyx

LabelArray = NDArray[np.uint8]
UNLABELLED = 255
"""Where no label file reaches: neither background nor a class."""
_MOST_CLASSES = 253
_NO_MASK = 254
"""While masks are merged: reached by a mask, claimed by none. Above every class, so that the lowest number wins."""
_PARALLEL = 1e-6
"""Axes of two grids are parallel if they stray less than this within the volume (voxels)."""
_LEAST_COVERED = 0.5
_MOST_VOXELS = 1 << 30
_MOST_APART_MM = 1.0
_SUFFIXES = (".nii.gz", ".nii")
_NIBABEL_RAISES = (
    OSError, EOFError, ValueError, AttributeError, LookupError, zlib.error, ImageFileError, HeaderDataError,
)  # fmt: skip
"""What nibabel, gzip and zlib raise on files that are cut, altered or of another kind."""


@dataclass(frozen=True)
class Labels:
    """The labels of some volumes of a store, resampled and kept as files."""

    classes: tuple[str, ...]
    """Names; class number ``k`` of the arrays is ``classes[k - 1]``."""
    volumes: tuple[Volume, ...]
    """The labelled ones."""
    notes: tuple[str, ...] = ()
    """Which volumes are labelled, and what was odd."""
    _arrays: dict[str, Path] = field(default_factory=dict, repr=False)

    def of(self, volume: Volume) -> LabelArray:
        """Return a volume's labels, a memory map of its shape, uint8: 0 background, 1.. classes, 255 unlabelled."""
        return np.load(self._arrays[volume.volume_id], mmap_mode="r")  # type: ignore[no-any-return]

    def elsewhere(self, seed: int) -> Labels:
        """Return the same labels, each array moved round its volume by a third to two thirds of every axis."""
        return _Elsewhere(self.classes, self.volumes, self.notes, self._arrays, seed)


@dataclass(frozen=True)
class _Elsewhere(Labels):
    """Labels of the right size and shape in the wrong place: what a control is taught with."""

    seed: int = 0

    def of(self, volume: Volume) -> LabelArray:
        """Return the labels as an array of their own."""
        digest = hashlib.sha256(f"{self.seed}:{volume.volume_id}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        moved = [int(rng.integers(length // 3, length - length // 3 + 1)) for length in volume.shape]
        return np.roll(super().of(volume), moved, axis=(0, 1, 2))


def load_labels(source: Path, volumes: Sequence[Volume], scratch: Path, chosen: Sequence[str] = ()) -> Labels:
    """Resample the labels of all volumes that have some onto their grids, below ``scratch``.

    ``source`` is a folder of labels, or, for a single volume, a file. ``chosen`` are names of classes (or numbers); the
    others become background. NoInputError where no volume has labels; UsageError, naming the file, for labels that are
    no whole numbers, lie elsewhere, or cannot be read.
    """
    found = _find_all(source, volumes)
    names = _class_names(source, found.values())
    labelled = tuple(volume for volume in volumes if volume.volume_id in found)
    scratch.mkdir(parents=True, exist_ok=True)
    arrays, present, odd = {}, np.zeros(256, np.int64), 0
    for volume in labelled:
        array, same_shape = _on_grid_of(volume, found[volume.volume_id], names)
        present += np.bincount(array.ravel(), minlength=256)
        odd += not same_shape
        arrays[volume.volume_id] = scratch / f"{volume.volume_id}.npy"
        np.save(arrays[volume.volume_id], array)
    numbers = _choose(chosen, names, [int(n) for n in np.flatnonzero(present[1:UNLABELLED]) + 1], source)
    renumber = np.zeros(256, np.uint8)
    renumber[UNLABELLED] = UNLABELLED
    renumber[numbers] = np.arange(1, len(numbers) + 1)
    for path in arrays.values():
        np.save(path, renumber[np.load(path)])
    shapes = "of the shape of neither the scan nor the volume"
    placed = f"{counted(odd, 'label file')} {shapes}, placed by the affine"
    notes = (_told(source, found, volumes), *(placed,) * (odd > 0))
    return Labels(tuple(names.get(n, str(n)) for n in numbers), labelled, notes, arrays)


def labelled(source: Path, volumes: Sequence[Volume]) -> tuple[Volume, ...]:
    """Return the volumes that have labels in a folder, of which no voxel is read; errors as of `load_labels`."""
    found = _find_all(source, volumes)
    return tuple(volume for volume in volumes if volume.volume_id in found)


def nearest_on_grid(labels: LabelArray, labels_affine: Affine, shape: Zyx, affine: Affine) -> LabelArray:
    """Return for each voxel of a grid the label of the nearest voxel in world space; 255 beyond the labels.

    Both affines take ``[z, y, x, 1]`` to LPS mm.
    """
    to_labels = np.linalg.inv(labels_affine) @ affine
    steps, first, size = to_labels[:3, :3], to_labels[:3, 3], np.asarray(labels.shape)
    out = np.full(shape, UNLABELLED, np.uint8)
    if np.abs(steps - np.diag(np.diag(steps))).max() * max(shape) < _PARALLEL:
        nearest = [np.floor(first[a] + steps[a, a] * np.arange(shape[a]) + 0.5).astype(np.int64) for a in range(3)]
        inside = [(index >= 0) & (index < n) for index, n in zip(nearest, size, strict=True)]
        taken = labels[np.ix_(*(index[within] for index, within in zip(nearest, inside, strict=True)))]
        out[np.ix_(*inside)] = taken
        return out
    yx = np.stack(np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij"), axis=-1)
    plane = yx @ steps[:, 1:].T + first
    for z in range(shape[0]):
        index = np.floor(plane + z * steps[:, 0] + 0.5).astype(np.int64)
        within = ((index >= 0) & (index < size)).all(axis=-1)
        out[z][within] = labels[tuple(index[within].T)]
    return out


def _find_all(source: Path, volumes: Sequence[Volume]) -> dict[str, Path]:
    """Return the label file or folder of each volume that has one, by id."""
    if source.is_file() and len(volumes) == 1:
        return {volumes[0].volume_id: source}
    if not source.is_dir():
        of_one = f", or one file for a store of one volume (here: {len(volumes)})" if source.is_file() else ""
        raise NoInputError(f"{source}: expected a folder of labels{of_one}, found {'a file' if of_one else 'none'}")
    found = {volume.volume_id: path for volume in volumes if (path := _find(source, volume.volume_id))}
    _require_no_dead_link(source)
    if not found:
        example = volumes[0].volume_id if volumes else "VOLUME_ID"
        raise NoInputError(
            f"{source}: expected labels named after volumes of the store ({example}.nii.gz), found none; "
            "`maesil link-labels` makes such a folder"
        )
    return found


def _find(folder: Path, volume_id: str) -> Path | None:
    """Return a volume's label file, or its folder of masks; UsageError where it has several, or a folder has none."""
    files = [path for suffix in _SUFFIXES if (path := folder / f"{volume_id}{suffix}").is_file()]
    masks = folder / volume_id
    if len(found := files + [masks] * masks.is_dir()) > 1:
        raise UsageError(f"{found[0]}: expected one label file or folder of masks a volume, found {found[1].name} too")
    if masks.is_dir() and not _masks(masks):
        raise UsageError(f"{masks}: expected masks named after their classes (liver.nii.gz), found none")
    return found[0] if found else None


def _require_no_dead_link(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if not path.exists():
            raise UsageError(
                f"{path}: its target {path.readlink()} is no longer there; run `maesil link-labels` again, or remove it"
            )


def _told(source: Path, found: dict[str, Path], volumes: Sequence[Volume]) -> str:
    """Say which volumes are labelled, and what in the folder is named after none."""
    told = f"labels of {len(found)} of {counted(len(volumes), 'volume')}"
    used = {path.name for path in found.values()} | {"classes.json"}
    names = sorted(path.name for path in source.iterdir()) if source.is_dir() else []
    if left := [name for name in names if name not in used and not name.startswith(".")]:
        few = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        told += f"; {len(left)} not used, no label named after a volume of the store: {few}"
    return told


def _class_names(source: Path, paths: Iterable[Path]) -> dict[int, str]:
    """Return names by number: those of the mask files, in alphabetical order, or those of ``classes.json``."""
    masks = sorted({_stem(mask) for path in paths if path.is_dir() for mask in _masks(path)})
    if len(masks) > _MOST_CLASSES:
        raise UsageError(f"{source}: expected at most {_MOST_CLASSES} classes, found {len(masks)}")
    if masks:
        return dict(enumerate(masks, start=1))
    listed = (source if source.is_dir() else source.parent) / "classes.json"
    try:
        named: dict[str, Any] = parsed_json(listed.read_text(encoding="utf-8")) if listed.exists() else {}
        names = {int(number): str(name) for number, name in named.items()}
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f'{listed}: expected an object like {{"1": "liver"}}, found something else ({error})'
        ) from error
    if len(set(names.values())) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise UsageError(f"{listed}: expected a name of its own for each number, found {twice!r} twice")
    return names


def _choose(chosen: Sequence[str], names: dict[int, str], present: list[int], source: Path) -> list[int]:
    """Return the numbers of the classes asked for (default: all that occur), ascending."""
    by_name = {names.get(number, str(number)): number for number in present}
    if unknown := [name for name in chosen if name not in by_name]:
        raise UsageError(f"--classes: expected some of {', '.join(by_name) or '(none)'}, found {unknown[0]!r}")
    numbers = sorted(by_name[name] for name in chosen) if chosen else present
    if not numbers:
        raise UsageError(f"{source}: expected labels other than 0, found background alone")
    return numbers


def _on_grid_of(volume: Volume, path: Path, names: dict[int, str]) -> tuple[LabelArray, bool]:
    """Return the labels on a volume's grid, and whether every file has the shape of its scan or of the volume."""
    if not path.is_dir():
        return _resampled(volume, path, *_read(path))
    number_of = {name: number for number, name in names.items()}
    merged, same = np.full(volume.shape, UNLABELLED, np.uint8), True
    for first_mask, labels, affine in _merged_masks(path, number_of):
        array, same_shape = _resampled(volume, first_mask, labels, affine)
        merged, same = np.minimum(merged, array), same and same_shape
    merged[merged == _NO_MASK] = 0
    return merged, same


def _merged_masks(folder: Path, number_of: dict[str, int]) -> list[tuple[Path, LabelArray, Affine]]:
    """Return the masks of a folder, those on one grid in one array: the lowest number of those that claim a voxel."""
    on_grid: dict[tuple[Any, ...], tuple[Path, LabelArray, Affine]] = {}
    for mask in _masks(folder):
        values, affine = _read(mask, most=255)
        if len(found := np.unique(values[values > 0])) > 1:
            raise UsageError(
                f"{mask}: expected a binary mask of its class, found the values {', '.join(map(str, found[:4]))}; "
                f"labels of several classes are one file, {folder.name}.nii.gz"
            )
        numbers = np.where(values > 0, np.uint8(number_of[_stem(mask)]), np.uint8(_NO_MASK))
        grid = (values.shape, affine.round(6).tobytes())
        first, before, _ = on_grid.get(grid, (mask, numbers, affine))
        on_grid[grid] = (first, np.minimum(before, numbers), affine)
    return list(on_grid.values())


def _resampled(volume: Volume, path: Path, labels: LabelArray, affine: Affine) -> tuple[LabelArray, bool]:
    """Return labels on a volume's grid, and whether they have the shape of its scan or of the volume."""
    array = nearest_on_grid(labels, affine, volume.shape, volume.affine)
    covered = float((array != UNLABELLED).mean())
    if covered < _LEAST_COVERED:
        raise UsageError(
            f"{path}: expected labels of volume {volume.volume_id}, found that they cover {covered:.0%} of it in world "
            "space; are they of another scan?"
        )
    ordered = sorted(labels.shape)  # axes may be in another order in the file
    return array, ordered in (sorted(volume.source_shape), sorted(volume.shape))


def _read(path: Path, most: int = _MOST_CLASSES) -> tuple[LabelArray, Affine]:
    """Return whole numbers ``[z, y, x]`` and their affine (to LPS mm); UsageError for anything else."""
    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Pair):  # the base of all NIfTI images
            raise ValueError(f"a file of kind {type(image).__name__}")
        if math.prod(image.shape) > _MOST_VOXELS:
            raise ValueError(f"shape {image.shape}")
        values = np.asanyarray(image.dataobj)
        qform, code = image.header.get_qform(coded=True)
        placed = bool(code) or bool(image.header["sform_code"])
    except _NIBABEL_RAISES as error:
        raise UsageError(f"{path}: expected a NIfTI file of labels, found something else ({error})") from error
    if values.ndim > 3 and set(values.shape[3:]) == {1}:
        values = values.reshape(values.shape[:3])
    if values.ndim != 3 or values.dtype.kind not in "biuf":
        raise UsageError(f"{path}: expected one 3D volume of numbers, found shape {values.shape}, {values.dtype}")
    if not placed or not abs(np.linalg.det(image.affine)) > 1e-9:
        found = "one that places nothing" if placed else "neither; the header does not say where it lies"
        raise UsageError(f"{path}: expected an sform or a qform, found {found}")
    if code and qform is not None and np.abs(qform - image.affine).max() > _MOST_APART_MM:
        raise UsageError(
            f"{path}: its sform and qform place it differently; mend the header, so that it is known which"
        )
    whole = values if values.dtype.kind in "iub" else np.rint(values)
    lo, hi = float(np.min(whole)), float(np.max(whole))
    if not (lo >= 0 and hi <= most and (whole is values or np.allclose(values, whole, atol=1e-3, rtol=0))):
        raise UsageError(f"{path}: expected whole numbers from 0 to {most}, found {lo:g} to {hi:g} or fractions")
    return whole.astype(np.uint8).transpose(2, 1, 0), from_nifti(image.affine)


def _masks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIXES) and not path.name.startswith("."))


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
