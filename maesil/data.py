"""From stores to batches: who is held out, how HU are normalised, and which crop a step sees.

Everything a step sees is a function of (seed, step, sample), so that a resumed run goes on exactly where it was.
Shapes: B samples, c crop edge (voxels), k = c / 8 cells of the maps, T superpatch edge, t = T / 8.
"""

from __future__ import annotations

import math
import threading
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

from maesil.cache.reader import SuperpatchReader
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
        cls, paths: Sequence[Path], model: ModelConfig, *, where: str = "", weights: Sequence[float] = ()
    ) -> Sources:
        """Open stores for crops of ``model``; StoreError, UsageError or NoInputError name the one that fails.

        ``where`` takes some of the superpatches (`maesil.where`); ``weights`` are one a path, or none.
        """
        if where:
            parse(where)
        given: Sequence[float | None] = weights or [None] * len(paths)
        pairs = zip(map(Store.open, paths), given, strict=True)
        stores, shares = zip(*sorted(pairs, key=lambda pair: pair[0].fingerprint), strict=True)
        for store in stores:
            require_tile(model, store.superpatch, store.path)
        sources = cls(
            tuple(SuperpatchReader(store) for store in stores),
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
    valid = reader.read_map_region(volume.volume_id, "valid", _tile_start(volume, tile.index), (T, T, T))
    hu = reader.read_superpatch(volume.volume_id, tile.index)
    cells = hu.reshape(t, MAP_CELL, t, MAP_CELL, t, MAP_CELL).transpose(0, 2, 4, 1, 3, 5)
    shifted = cells[valid == 255].astype(np.int64) - np.iinfo(np.int16).min
    return np.bincount(shifted.ravel(), minlength=_HU_BINS)


@dataclass(frozen=True)
class Draw:
    """What one sample of one step is: a crop, how it is mirrored, and the seed of its mask."""

    reader: SuperpatchReader
    volume: Volume
    tile: Zyx
    offset: Zyx
    """First voxel of the crop inside the superpatch; multiples of 8."""
    flip: tuple[bool, bool, bool]
    mask_seed: int
    window_shift: tuple[float, float] = (0.0, 0.0)
    """How the ends of the intensity window are moved, -1..1 of the most that is allowed."""

    def __str__(self) -> str:
        return f"volume {self.volume.volume_id}, superpatch {self.tile}, offset {self.offset}"


class CropSampler:
    """Draws training crops: a superpatch by its body share, then any of its crops with enough body."""

    def __init__(self, sources: Sources, groups: Iterable[str], crop: int, config: TrainConfig) -> None:
        self.crop, self.seed = crop, config.seed
        self.min_body, self.flips = config.min_body, tuple(axis in config.flips for axis in "zyx")
        self._tiles = [
            (reader, volume, tile.index, tile.body)
            for reader, volume in sources.volumes(groups)
            for tile in volume.superpatches
            if tile.body > 0 and len(self._offsets(reader, volume, tile.index))
        ]
        if not self._tiles:
            raise NoInputError(
                f"no crop of {crop} voxels in the training volumes has a body share of {config.min_body}; "
                "lower train.min_body, or train on other stores"
            )
        self._cumulative = np.cumsum(sources.by_weight([(reader, body) for reader, *_, body in self._tiles]))

    def draw(self, step: int, sample: int) -> Draw:
        """Draw sample number ``sample`` of step ``step``: the same for equal seeds, whatever came before."""
        # Raw Philox numbers, since numpy keeps those equal from version to version (NEP 19).
        philox = np.random.Philox(np.random.SeedSequence((self.seed, step, sample)))
        tile_raw, offset_raw, flip_raw, mask_raw, lo_raw, hi_raw = (int(raw) for raw in philox.random_raw(6))
        share = tile_raw / 2**64 * self._cumulative[-1]
        place = min(int(np.searchsorted(self._cumulative, share, side="right")), len(self._tiles) - 1)
        reader, volume, tile, _ = self._tiles[place]
        offsets = self._offsets(reader, volume, tile)
        z, y, x = (int(cell) * MAP_CELL for cell in offsets[offset_raw % len(offsets)])
        flip_z, flip_y, flip_x = (on and bool(flip_raw >> axis & 1) for axis, on in enumerate(self.flips))
        shift = (lo_raw / 2**63 - 1, hi_raw / 2**63 - 1)
        return Draw(reader, volume, tile, (z, y, x), (flip_z, flip_y, flip_x), mask_raw >> 1, shift)

    def _offsets(self, reader: SuperpatchReader, volume: Volume, tile: Zyx) -> NDArray[np.int64]:
        """List the offsets (cells, ``[n, 3]``) of a superpatch's crops that hold enough body."""
        T, k = volume.tile, self.crop // MAP_CELL
        body = reader.read_map_region(volume.volume_id, "body", _tile_start(volume, tile), (T, T, T))
        enough = max(self.min_body * 255 * k**3, 1)
        return np.argwhere(window_sums(body, k) >= enough)


def window_sums(cells: MapArray, k: int) -> NDArray[np.int64]:
    """Sum every k^3 window of a 3D array by cumulative sums: ``[t, t, t]`` to ``[t - k + 1, ...]``."""
    sums = cells.astype(np.int64)
    for axis in range(3):
        ends = np.cumsum(sums, axis=axis)
        ends = np.concatenate([np.zeros_like(ends.take([0], axis)), ends], axis)
        last = np.arange(k, ends.shape[axis])
        sums = ends.take(last, axis) - ends.take(last - k, axis)
    return sums


@dataclass(frozen=True)
class Batch:
    """One step's crops. The tensors are buffers of a ring: they hold until the next batch is asked for."""

    hu: Tensor
    """int16 HU ``[B, c, c, c]``, not mirrored yet."""
    valid: Tensor
    """uint8 ``[B, k, k, k]``: share, 0..255, of each cell inside the scan."""
    body: Tensor
    """uint8 ``[B, k, k, k]``: share inside the patient's body."""
    flip: Tensor
    """bool ``[B, 3]``: which axes z, y, x the model is to see mirrored."""
    draws: tuple[Draw, ...]


class CropLoader:
    """Reads the batches of coming steps on a few threads into a ring of buffers.

    ``with CropLoader(...) as loader: for batch in loader.batches(start, stop)``. What a reader raises (StoreError for
    damage) is raised where the batch is asked for; leaving the block ends the threads.
    """

    def __init__(self, sampler: CropSampler, batch: int, readers: int = 2, ahead: int = 2, pin: bool = False) -> None:
        self._sampler, self._batch = sampler, batch
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="maesil-reader")
        c, k = sampler.crop, sampler.crop // MAP_CELL
        self._ring = [
            (
                torch.empty(batch, c, c, c, dtype=torch.int16, pin_memory=pin),
                torch.empty(batch, k, k, k, dtype=torch.uint8, pin_memory=pin),
                torch.empty(batch, k, k, k, dtype=torch.uint8, pin_memory=pin),
            )
            for _ in range(ahead + 1)
        ]
        self._thread = threading.local()

    def __enter__(self) -> CropLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps ``start`` .. ``stop - 1``."""
        reading = {}
        for step in range(start, stop):
            for ahead in range(step, min(stop, step + len(self._ring))):
                if ahead not in reading:
                    reading[ahead] = [self._pool.submit(self._fill, ahead, i) for i in range(self._batch)]
            draws = tuple(future.result() for future in reading[step])
            flip = torch.tensor([draw.flip for draw in draws])
            yield Batch(*self._ring[step % len(self._ring)], flip=flip, draws=draws)
            del reading[step]

    def _fill(self, step: int, sample: int) -> Draw:
        draw = self._sampler.draw(step, sample)
        crop = self._sampler.crop
        hu, valid, body = (buffer[sample].numpy() for buffer in self._ring[step % len(self._ring)])
        if crop == draw.volume.tile:
            draw.reader.read_superpatch(draw.volume.volume_id, draw.tile, hu)
        else:
            superpatch = draw.reader.read_superpatch(draw.volume.volume_id, draw.tile, self._scratch(draw.volume.tile))
            hu[:] = superpatch[tuple(slice(o, o + crop) for o in draw.offset)]
        tile_z, tile_y, tile_x = _tile_start(draw.volume, draw.tile)
        z, y, x = draw.offset
        start = (tile_z + z, tile_y + y, tile_x + x)
        valid[:] = draw.reader.read_map_region(draw.volume.volume_id, "valid", start, (crop, crop, crop))
        body[:] = draw.reader.read_map_region(draw.volume.volume_id, "body", start, (crop, crop, crop))
        blank_outside_scan(hu, valid)
        return draw

    def _scratch(self, tile: int) -> HuArray:
        """Return this thread's own buffer for a whole superpatch."""
        if getattr(self._thread, "buffer", np.empty(0)).shape != (tile, tile, tile):
            self._thread.buffer = np.empty((tile, tile, tile), dtype=np.int16)
        buffer: HuArray = self._thread.buffer
        return buffer


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
        if sources.takes(reader, volume, _tile_of(volume, origin))
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
    """Set the voxels of cells without any valid one to air, in place: no model may learn from what is no scan."""
    outside = valid == 0
    if outside.any():
        k = len(valid)
        cells = hu.reshape(k, MAP_CELL, k, MAP_CELL, k, MAP_CELL)  # a view: crops are contiguous
        cells.transpose(0, 2, 4, 1, 3, 5)[outside] = AIR_HU


def _tile_of(volume: Volume, voxel: Zyx) -> Zyx:
    z, y, x = (at // volume.tile for at in voxel)
    return z, y, x


def _tile_start(volume: Volume, index: Zyx) -> Zyx:
    z, y, x = index
    return z * volume.tile, y * volume.tile, x * volume.tile
