"""Stores and their patients: who is held out, how HU are normalised, the grid that evaluation goes over.

Everything a step sees is a function of (seed, step, sample), so that a resumed run goes on exactly where it was.
Shapes: B samples, c crop edge (voxels), k = c / 8 cells of the maps, T superpatch edge, t = T / 8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from maesil.cache.ram import ram_readers
from maesil.cache.reader import SuperpatchReader, tile_at, tile_start
from maesil.cache.uses import StoreUse, use_of
from maesil.commit import Superpatch, Volume
from maesil.config import ModelConfig, TrainConfig, require_tile
from maesil.errors import NoInputError
from maesil.index import superpatch_table
from maesil.same_scan import patients
from maesil.store import Store
from maesil.types import AIR_HU, MAP_CELL, HuArray, Intensity, MapArray, Window, Zyx
from maesil.where import parse, select


@dataclass(frozen=True)
class Sources:
    """The stores of a run, in an order that does not depend on how they were named."""

    readers: tuple[SuperpatchReader, ...]
    fingerprints: tuple[str, ...]
    weights: tuple[float, ...] = ()
    """Relative share of the crops that each store gives; empty: by the body it holds."""
    patients: Mapping[str, str] = field(default_factory=dict)
    """For each patient group the one that stands for it: groups that share a scan are one patient."""
    selected: tuple[Set[tuple[str, Zyx]] | None, ...] = ()
    """Of each store the superpatches that a filter takes, by volume and index; None takes all."""
    uses: tuple[StoreUse, ...] = ()
    """What the run is to note of its stores."""

    @classmethod
    def open(
        cls, paths: Sequence[Path], model: ModelConfig, *, where: str = "", weights: Sequence[float] = (), ram: int = 0
    ) -> Sources:
        """Open stores for crops of ``model``; StoreError, UsageError or NoInputError name the one that fails.

        ``where`` takes some of the superpatches (`maesil.where`); ``weights`` are one a path, or none. Up to ``ram``
        bytes of superpatches stay in memory once they were read.
        """
        if where:
            parse(where)
        given: Sequence[float | None] = weights or [None] * len(paths)
        pairs = zip(map(Store.open, paths), given, strict=True)
        stores, shares = zip(*sorted(pairs, key=lambda pair: pair[0].fingerprint), strict=True)
        for store in stores:
            require_tile(model, store.superpatch, store.path)
        sources = cls(
            ram_readers(stores, ram) if ram else tuple(SuperpatchReader(store) for store in stores),
            tuple(store.fingerprint for store in stores),
            tuple(share for share in shares if share is not None),
            patients(stores),
            tuple(select(superpatch_table(store), where) if where else None for store in stores),
            tuple(map(use_of, stores, shares)),
        )
        if not sources.groups:
            asked = f" that --where {where!r} takes; change it" if where else "; run `maesil ingest` first"
            raise NoInputError(f"{', '.join(map(str, paths))}: no volumes to train on{asked}")
        return sources

    @property
    def groups(self) -> set[str]:
        """All patient groups."""
        return {volume.group for reader in self.readers for volume in self._volumes_of(reader)}

    def volumes(self, groups: Iterable[str]) -> Iterator[tuple[SuperpatchReader, Volume]]:
        """Yield the volumes of these patient groups, each with its reader, in a fixed order.

        Where there is a filter they hold only the superpatches it takes, and those without any are left out.
        """
        wanted = set(groups)
        for reader in self.readers:
            yield from ((reader, volume) for volume in self._volumes_of(reader) if volume.group in wanted)

    def takes(self, reader: SuperpatchReader, volume: Volume, index: Zyx) -> bool:
        """Return whether the filter takes a superpatch."""
        selected = self.selected[self.readers.index(reader)] if self.selected else None
        return selected is None or (volume.volume_id, index) in selected

    def _volumes_of(self, reader: SuperpatchReader) -> Iterator[Volume]:
        selected = self.selected[self.readers.index(reader)] if self.selected else None
        for _, volume in sorted(reader.volumes.items()):
            if selected is not None:
                kept = tuple(patch for patch in volume.superpatches if (volume.volume_id, patch.index) in selected)
                volume = replace(volume, superpatches=kept)
            if volume.superpatches:
                yield volume

    def by_weight(self, tiles: Sequence[tuple[SuperpatchReader, float]]) -> NDArray[np.float64]:
        """Return the weights of superpatches, scaled so that each store has its own share where shares are given."""
        scaled = np.array([weight for _, weight in tiles], dtype=np.float64)
        for reader, weight in zip(self.readers, self.weights, strict=False):
            of_store = np.array([owner is reader for owner, _ in tiles])
            scaled[of_store] *= weight / (scaled[of_store].sum() or 1)
        return scaled


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
        if sources.takes(reader, volume, tile_at(volume, origin))
        and reader.read_map_region(volume.volume_id, "body", origin, size).mean() >= max(255 * config.min_body, 1e-9)
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

    ``hu`` int16 ``[z, y, x]`` C-contiguous, edges multiples of 8; ``valid`` uint8, its cells, or only those at its
    beginning: the rest is left as it is.
    """
    outside = valid == 0
    if outside.any():
        z, y, x = (n // MAP_CELL for n in hu.shape)
        to_z, to_y, to_x = valid.shape
        # Four voxels at a time: three times as fast as one by one.
        fours = hu.reshape(z, MAP_CELL, y, MAP_CELL, x * MAP_CELL).view(np.int64)[:to_z, :, :to_y, :, : 2 * to_x]
        np.copyto(fours, _FOUR_OF_AIR, where=outside.repeat(2, axis=2)[:, None, :, None, :])


_FOUR_OF_AIR = np.full(4, AIR_HU, dtype=np.int16).view(np.int64)[0]
