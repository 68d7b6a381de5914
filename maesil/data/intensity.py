"""How bright the training volumes are: the mean and deviation by which a model sees HU."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from maesil.data.sources import Sources
from maesil.errors import NoInputError
from maesil.store.grid import tile_start
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Superpatch, Volume
from maesil.text import counted
from maesil.types import MAP_CELL, Intensity, Window


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
        raise NoInputError(
            f"the training volumes hold no contrast inside the window {window} HU: {counted(count, 'valid voxel')}"
        )
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
