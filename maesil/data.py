"""Stores and their patients: who is held out, how HU are normalised, the grid that evaluation goes over.

Everything a step sees is a function of (seed, step, sample), so that a resumed run goes on exactly where it was.
Shapes: B samples, c crop edge (voxels), k = c / 8 cells of the maps, T superpatch edge, t = T / 8.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from maesil.cache.ram import ram_readers
from maesil.cache.reader import SuperpatchReader, tile_start
from maesil.commit import Superpatch, Volume
from maesil.config import ModelConfig, TrainConfig, require_tile
from maesil.errors import NoInputError
from maesil.store import Store
from maesil.types import AIR_HU, MAP_CELL, HuArray, Intensity, MapArray, Window, Zyx


@dataclass(frozen=True)
class Sources:
    """The stores of a run, in an order that does not depend on how they were named."""

    readers: tuple[SuperpatchReader, ...]
    fingerprints: tuple[str, ...]
    weights: tuple[float, ...] = ()
    """Relative share of the crops that each store gives; empty: by the body it holds."""

    @classmethod
    def open(cls, paths: Sequence[Path], model: ModelConfig, ram: int = 0) -> Sources:
        """Open stores for crops of ``model``; StoreError, UsageError or NoInputError name the one that fails.

        Up to ``ram`` bytes of superpatches stay in memory once they were read.
        """
        stores = sorted((Store.open(path) for path in paths), key=lambda store: store.fingerprint)
        for store in stores:
            require_tile(model, store.superpatch, store.path)
        readers = ram_readers(stores, ram) if ram else tuple(SuperpatchReader(store) for store in stores)
        sources = cls(readers, tuple(store.fingerprint for store in stores))
        if not sources.groups:
            raise NoInputError(f"{', '.join(map(str, paths))}: no volumes to train on; run `maesil ingest` first")
        return sources

    @property
    def groups(self) -> set[str]:
        """All patient groups."""
        return {volume.group for reader in self.readers for volume in reader.volumes.values()}

    def volumes(self, groups: Iterable[str]) -> Iterator[tuple[SuperpatchReader, Volume]]:
        """Yield the volumes of these patient groups, each with its reader, in a fixed order."""
        wanted = set(groups)
        for reader in self.readers:
            for _, volume in sorted(reader.volumes.items()):
                if volume.group in wanted:
                    yield reader, volume


@dataclass(frozen=True)
class Split:
    """Patient groups trained on and held out; nobody is in both."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...] = ()
    """Set aside from both, for scores."""


def split_groups(groups: Iterable[str], share: float, seed: int) -> Split:
    """Hold out a share of the patient groups, those of the lowest SHA-256 of (seed, group).

    At least one where there are two or more, none of a single one or for a share of 0, never all.
    """
    ranked = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).hexdigest())
    held_out = 0
    if share > 0 and len(ranked) > 1:
        held_out = min(max(1, math.floor(share * len(ranked) + 0.5)), len(ranked) - 1)
    return Split(train=tuple(sorted(ranked[held_out:])), validation=tuple(sorted(ranked[:held_out])))


def measure_intensity(sources: Sources, groups: Iterable[str], window: Window, workers: int = 2) -> Intensity:
    """Measure mean and standard deviation of the windowed voxels of all cells that are wholly valid.

    Exact and independent of the order: superpatches add up in one histogram of HU. NoInputError where there is
    no such voxel, or no two values.
    """
    histogram = np.zeros(_HU_BINS, dtype=np.int64)
    tiles = ((r, v, s) for r, v in sources.volumes(groups) for s in v.superpatches if s.valid > 0)
    with ThreadPoolExecutor(workers) as pool:
        while wave := [tile for _, tile in zip(range(16 * workers), tiles, strict=False)]:
            for counts in pool.map(_hu_histogram, *zip(*wave, strict=True)):
                histogram += counts
    lo, hi = window
    hu = np.arange(_HU_BINS, dtype=np.float64) + np.iinfo(np.int16).min
    values, count = (hu.clip(lo, hi) - lo) / (hi - lo), int(histogram.sum())
    mean = float((histogram * values).sum() / count) if count else 0.0
    std = math.sqrt(float((histogram * (values - mean) ** 2).sum() / count)) if count else 0.0
    if std == 0:
        raise NoInputError(f"the training volumes hold no contrast inside the window {window} HU: {count} valid voxels")
    return Intensity(window=window, mean=mean, std=std)


_HU_BINS = 2**16


def _hu_histogram(reader: SuperpatchReader, volume: Volume, tile: Superpatch) -> NDArray[np.int64]:
    """Count each int16 value over the wholly valid cells of one superpatch."""
    T, t = volume.tile, volume.tile // MAP_CELL
    valid = reader.read_map_region(volume.volume_id, "valid", tile_start(volume, tile.index), (T, T, T))
    hu = reader.read_superpatch(volume.volume_id, tile.index)
    cells = hu.reshape(t, MAP_CELL, t, MAP_CELL, t, MAP_CELL).transpose(0, 2, 4, 1, 3, 5)
    shifted = cells[valid == 255].astype(np.int64) - np.iinfo(np.int16).min
    return np.bincount(shifted.ravel(), minlength=_HU_BINS)


@dataclass(frozen=True)
class Crop:
    """One crop of a volume on the fixed grid that evaluation goes over."""

    volume_id: str
    origin: Zyx
    """First voxel of the crop in the volume."""
    hu: HuArray
    """int16 HU ``[c, c, c]``; -1024 beyond the volume."""
    valid: MapArray
    """uint8 ``[k, k, k]``: share, 0..255, of each cell inside the scan; 0 beyond the volume."""
    body: MapArray


def grid_crops(
    reader: SuperpatchReader, volume_ids: Iterable[str], crop: int, min_valid: float = 0.0
) -> Iterator[Crop]:
    """Yield the aligned grid of crops of each volume, z y x, where any voxel is valid (and ``min_valid`` of all)."""
    for volume_id in volume_ids:
        for origin in grid_origins(reader.volumes[volume_id], crop):
            valid = reader.read_map_region(volume_id, "valid", origin, (crop, crop, crop))
            if valid.any() and valid.mean() >= 255 * min_valid:
                yield read_crop(reader, volume_id, origin, crop)


def grid_origins(volume: Volume, crop: int) -> Iterator[Zyx]:
    """Yield the first voxels of the aligned grid of crops that covers a volume, in the order z, y, x."""
    z, y, x = volume.shape
    yield from product(range(0, z, crop), range(0, y, crop), range(0, x, crop))


def validation_crops(sources: Sources, groups: Iterable[str], crop: int, config: TrainConfig) -> list[Crop]:
    """Read crops of the held-out patients with enough body: at most so many, spread evenly, always the same."""
    size = (crop, crop, crop)
    places = [
        (reader, volume.volume_id, origin)
        for reader, volume in sources.volumes(groups)
        for origin in grid_origins(volume, crop)
        if reader.read_map_region(volume.volume_id, "body", origin, size).mean() >= max(255 * config.min_body, 1e-9)
    ]
    count = min(len(places), config.validation_crops)
    chosen = [places[i * len(places) // count] for i in range(count)]
    return [read_crop(*place, crop) for place in chosen]


def patch_shares(cells_BZYX: Tensor, patch: int, flip: Tensor | None = None) -> Tensor:
    """Turn map cells (uint8 ``[B, k, k, k]``) into the share of each patch, float32 ``[B, L]`` in 0..1.

    With ``flip`` bool ``[B, 3]`` the shares are those of the mirrored crop, in the order of its tokens. A patch smaller
    than a cell gets the share of its cell.
    """
    shares = cells_BZYX.float() / 255
    if flip is not None:
        mirrored = [one.flip(on.nonzero().flatten().tolist()) for one, on in zip(shares, flip, strict=True)]
        shares = torch.stack(mirrored)
    if patch >= MAP_CELL:
        shares = functional.avg_pool3d(shares[:, None], patch // MAP_CELL)
    else:
        for axis in (1, 2, 3):
            shares = shares.repeat_interleave(MAP_CELL // patch, dim=axis)
    return shares.flatten(1)


def read_crop(reader: SuperpatchReader, volume_id: str, origin: Zyx, crop: int) -> Crop:
    """Read the crop of a volume at any origin of multiples of 8, cells without any valid voxel set to air."""
    size = (crop, crop, crop)
    valid, body = (reader.read_map_region(volume_id, name, origin, size) for name in ("valid", "body"))
    hu = reader.read_region(volume_id, origin, size)
    blank_outside_scan(hu, valid)
    return Crop(volume_id, origin, hu, valid, body)


def blank_outside_scan(hu: HuArray, valid: MapArray) -> None:
    """Set the voxels of cells without any valid one to air, in place: no model may learn from what is no scan.

    ``hu`` int16 ``[z, y, x]`` C-contiguous, edges multiples of 8; ``valid`` uint8, its cells.
    """
    outside = valid == 0
    if outside.any():
        z, y, x = outside.shape
        # Four voxels at a time: three times as fast as one by one.
        rows = hu.reshape(z, MAP_CELL, y, MAP_CELL, x * MAP_CELL).view(np.int64)
        np.copyto(rows, _FOUR_OF_AIR, where=outside.repeat(MAP_CELL // 4, axis=2)[:, None, :, None, :])


_FOUR_OF_AIR = np.full(4, AIR_HU, dtype=np.int16).view(np.int64)[0]
