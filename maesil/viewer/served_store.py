"""What a browser is given of a store: its volumes, their voxels and overlays as NIfTI, a small picture of each."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from maesil.geometry import coarser
from maesil.store.explain import Explanation, explanation
from maesil.store.labels import LabelImage, label_names, read_label_image
from maesil.store.nifti import nifti_image
from maesil.store.pictures import grey_png, middle_plane
from maesil.store.reader import MAPS, SuperpatchReader
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.types import MAP_CELL, HuArray, Zyx

MOST_VOXELS = 160_000_000
"""More are not sent unless asked for: a browser needs six bytes for each."""
_PICTURE_PIXELS = 220
_PICTURES_KEPT = 1000
_CORONAL = 1


class ServedStore:
    """One store, read by the threads of a server. ``sources`` are the files of each volume by its id."""

    overlays = MAPS
    """What may be laid over each volume."""

    def __init__(self, store: Store, sources: Mapping[str, Sequence[str]] | None = None) -> None:
        self.store = store
        self._sources = sources or {}
        self._one_at_a_time = threading.Lock()
        self._picture_of = lru_cache(_PICTURES_KEPT)(self._picture)
        self.refresh()

    def refresh(self) -> None:
        """Take in what was committed to the store since."""
        self._reader = SuperpatchReader(self.store)

    @property
    def volumes(self) -> Mapping[str, Volume]:
        """The volumes by id, as they were when last refreshed."""
        return self._reader.volumes

    def found(self, words: str) -> list[Volume]:
        """Return the volumes in whose id, patient group, notes or technical values every one of some words occurs."""
        wanted = words.lower().split()
        return [volume for volume in self.volumes.values() if all(word in _text(volume) for word in wanted)]

    def explained(self, volume_id: str) -> Explanation:
        """Return what `maesil store explain` knows of a volume."""
        return explanation(self.store, volume_id, self._sources)

    def ct(self, volume_id: str, step: Zyx) -> bytes:
        """Return every ``step``-th voxel along z, y, x as NIfTI (int16 HU): with steps of 1 what the store exports."""
        volume = self.volumes[volume_id]
        with self._one_at_a_time:  # a scan may be large: never several of them in memory
            return nifti_image(self._voxels(volume, step), coarser(volume.affine, step)).to_bytes()

    def overlay(self, volume_id: str, name: str) -> bytes:
        """Return a map as NIfTI (uint8), a voxel for each of its cells."""
        affine = coarser(self.volumes[volume_id].affine, (MAP_CELL,) * 3, [(MAP_CELL - 1) / 2] * 3)
        return nifti_image(self._reader.read_map(volume_id, name), affine).to_bytes()

    def labels(self, volume_id: str) -> list[str]:
        """Return the names of the label images of a volume."""
        return label_names(self.volumes[volume_id])

    def label_image(self, volume_id: str, name: str) -> LabelImage:
        """Return a label image, voxels and names of classes."""
        return read_label_image(self.store, self.volumes[volume_id], name)

    def label_voxels(self, volume_id: str, name: str, step: Zyx) -> bytes:
        """Return every ``step``-th voxel of a label image as NIfTI (uint8)."""
        kept = self.label_image(volume_id, name).labels[:: step[0], :: step[1], :: step[2]]
        return nifti_image(kept, coarser(self.volumes[volume_id].affine, step)).to_bytes()

    def picture(self, volume_id: str) -> bytes:
        """Return the middle coronal plane as a small PNG: the patient's left at the right, feet down."""
        return self._picture_of(volume_id, self.volumes[volume_id].attempt)

    def _picture(self, volume_id: str, attempt: str) -> bytes:
        volume = self.volumes[volume_id]
        plane = middle_plane(volume, self._reader, _CORONAL)[::-1]  # z grows to the head
        millimetres = plane.shape[0] * volume.spacing[0], plane.shape[1] * volume.spacing[2]
        height, width = (max(1, round(mm / max(millimetres) * _PICTURE_PIXELS)) for mm in millimetres)
        return grey_png(plane, width, height)

    def _voxels(self, volume: Volume, step: Zyx) -> HuArray:
        """Read a layer of superpatches at a time, so that voxels left out are never all in memory."""
        depth, height, width = volume.shape
        kept = np.empty([-(-n // every) for n, every in zip(volume.shape, step, strict=True)], dtype=np.int16)
        every = step[0]
        for start in range(0, depth, volume.tile):
            thick = min(volume.tile, depth - start)
            layer = self._reader.read_region(volume.volume_id, (start, 0, 0), (thick, height, width))
            chosen = layer[-start % every :: every, :: step[1], :: step[2]]
            first = -(-start // every)
            kept[first : first + len(chosen)] = chosen
        return kept


def step_for(volume: Volume, most: int = MOST_VOXELS) -> Zyx:
    """Return the smallest steps along z, y, x that leave at most so many voxels, as near to cubes as they come."""
    step = [1, 1, 1]
    while np.prod([-(-n // every) for n, every in zip(volume.shape, step, strict=True)], dtype=np.int64) > most:
        finest = min(range(3), key=lambda axis: volume.spacing[axis] * step[axis])
        step[finest] += 1
    return step[0], step[1], step[2]


def _text(volume: Volume) -> str:
    technical = (f"{name} {value}" for name, value in volume.source.items())
    return " ".join([volume.volume_id, volume.group, *volume.notes, *technical]).lower()
