"""Which crops a step sees: a function of (seed, step, sample), so that a resumed run goes on exactly where it was.

Shapes: c crop edge (voxels), k = c / 8 cells of the maps, T superpatch edge, t = T / 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maesil.cache.reader import SuperpatchReader
from maesil.commit import Volume
from maesil.config import TrainConfig
from maesil.data import Sources, tile_start
from maesil.errors import NoInputError
from maesil.types import MAP_CELL, MapArray, Zyx


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
        self._cumulative = np.cumsum([body for *_, body in self._tiles])

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
        body = reader.read_map_region(volume.volume_id, "body", tile_start(volume, tile), (T, T, T))
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
