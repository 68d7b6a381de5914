"""Which crops a step sees: a function of (seed, step, sample), so that a resumed run goes on exactly where it was.

Crops are drawn in visits to *blocks*. With ``offsets="across"`` a block is all crops that begin in one superpatch and
may reach into the next one along each axis: 2x2x2 superpatches are read once, and a visit cuts several crops of them.
With ``"inside"`` it is the crops within one superpatch, and a visit cuts one. Why so: ``docs/decisions/0009``.

Shapes: c crop edges (voxels; a cube has one), k = c / 8 cells of the maps, T superpatch edge, t = T / 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from maesil.config.schema import TrainConfig
from maesil.data.crops import least_body
from maesil.data.sources import Sources, reading_threads
from maesil.errors import NoInputError
from maesil.store.grid import tile_start
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.types import MAP_CELL, Edges, MapArray, Zyx, edges_told, zyx

_EPOCH, _VISIT, _SAMPLE = range(3)
"""What random numbers are drawn for."""


@dataclass(frozen=True)
class Draw:
    """What one sample of one step is: a crop, how it is mirrored, and the seed of its mask."""

    store: int
    """Which of the sampler's readers reads it."""
    volume: Volume
    origin: Zyx
    """First voxel of the crop in the volume; multiples of 8."""
    visit: int
    """Number of the visit that cuts it; crops of one visit share what is read."""
    flip: tuple[bool, bool, bool]
    mask_seed: int
    window_shift: tuple[float, float] = (0.0, 0.0)
    """How the ends of the intensity window are moved, -1..1 of the most that is allowed."""

    def __str__(self) -> str:
        return f"volume {self.volume.volume_id}, crop at {self.origin}"


@dataclass(frozen=True)
class _Block:
    """The crops of a volume that begin in one superpatch."""

    store: int
    volume: Volume
    index: Zyx


class CropSampler:
    """Draws training crops, each in proportion to its body share, among those with enough body.

    Blocks are visited epoch by epoch, in a seeded order. In an epoch of n visits to n blocks each is visited in
    proportion to its weight (the body shares of all its crops together), rounded up or down at random: blocks of equal
    weight exactly once each. Each place in the batch works through a visit of its own, ``crops_per_visit`` steps long,
    and the places change visits at different steps, so that a batch mixes as many blocks as it has crops.
    """

    def __init__(self, sources: Sources, groups: Iterable[str], crop: Edges, config: TrainConfig) -> None:
        self.crop, self.seed, self.batch = zyx(crop), config.seed, config.batch
        self.across = config.offsets == "across"
        self.crops_per_visit = config.crops_per_visit if self.across else 1
        self._config, self.flips = config, tuple(axis in config.flips for axis in "zyx")
        self.readers = sources.readers
        self._owners = [(self.readers.index(reader), volume) for reader, volume in sources.volumes(groups)]
        with ThreadPoolExecutor(reading_threads(self.readers, config.readers)) as pool:
            weights = list(pool.map(self._weights_of, *zip(*self._owners, strict=True))) if self._owners else []
        taken = [np.flatnonzero(of_volume) for of_volume in weights]
        self._owner = np.repeat(np.arange(len(taken), dtype=np.int32), list(map(len, taken)))
        """Of each block its volume, a place in ``_owners``: a large store has more blocks than Python objects bear."""
        self._which = np.concatenate([*taken, np.empty(0, np.intp)]).astype(np.int32)
        """Of each block its superpatch, counted in its volume."""
        if not len(self._owner):
            raise NoInputError(
                f"no crop of {edges_told(crop)} voxels in the training volumes has a body share of {config.min_body}; "
                "lower train.min_body, set train.thin=pad where scans are thinner than a crop, or train on other stores"
            )
        stores = np.array([store for store, _ in self._owners])[self._owner]
        self._weights = sources.by_weight(stores, np.concatenate([w[t] for w, t in zip(weights, taken, strict=True)]))
        # A few epochs and visits are in use at any time; drawing one anew gives the same.
        self._epoch = lru_cache(maxsize=4)(self._draw_epoch)
        self._origins = lru_cache(maxsize=4 * self.batch)(self._draw_origins)

    @property
    def cells(self) -> Zyx:
        """Cells of the maps in a crop along z, y, x."""
        z, y, x = (edge // MAP_CELL for edge in self.crop)
        return z, y, x

    @property
    def volumes(self) -> list[tuple[SuperpatchReader, Volume]]:
        """The volumes that crops come from."""
        giving = (self._owners[owner] for owner in np.unique(self._owner))
        return list({volume.volume_id: (self.readers[store], volume) for store, volume in giving}.values())

    @property
    def epoch_steps(self) -> float:
        """Steps in which as many visits end as there are blocks."""
        return len(self._owner) * self.crops_per_visit / self.batch

    def draw(self, step: int, sample: int) -> Draw:
        """Draw sample number ``sample`` of step ``step``: the same for equal seeds, whatever came before."""
        visit, turn = self.visit(step, sample)
        block = self._block(visit)
        flip_raw, mask_raw, lo_raw, hi_raw = self._random(4, _SAMPLE, step, sample).tolist()
        flip_z, flip_y, flip_x = (on and bool(flip_raw >> axis & 1) for axis, on in enumerate(self.flips))
        shift = (lo_raw / 2**63 - 1, hi_raw / 2**63 - 1)
        origin = self._origins(visit)[turn]
        return Draw(block.store, block.volume, origin, visit, (flip_z, flip_y, flip_x), mask_raw >> 1, shift)

    def visit(self, step: int, sample: int) -> tuple[int, int]:
        """Return the visit that place ``sample`` of the batch is at in ``step``, and how many crops it has cut."""
        head_start = sample * self.crops_per_visit // self.batch
        round_, turn = divmod(step + head_start, self.crops_per_visit)
        return round_ * self.batch + sample, turn

    def _block(self, visit: int) -> _Block:
        epoch, place = divmod(visit, len(self._owner))
        number = int(self._epoch(epoch)[place])
        store, volume = self._owners[self._owner[number]]
        z, y, x = (int(volume.column(name)[self._which[number]]) for name in ("iz", "iy", "ix"))
        return _Block(store, volume, (z, y, x))

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        """Order the visits of an epoch: systematic sampling by weight over shuffled blocks, then shuffled."""
        n = len(self._owner)
        raw = self._random(2 * n + 1, _EPOCH, epoch)
        shuffled = np.argsort(raw[:n], kind="stable")
        ends = np.cumsum(self._weights[shuffled])
        marks = (np.arange(n) + int(raw[-1]) / 2**64) * (ends[-1] / n)
        visited = shuffled[np.searchsorted(ends, marks, side="right").clip(max=n - 1)]
        order: NDArray[np.int64] = visited[np.argsort(raw[n : 2 * n], kind="stable")]
        return order

    def _draw_origins(self, visit: int) -> list[Zyx]:
        """Draw the crops of a visit: their first voxels, each in proportion to its body share."""
        block = self._block(visit)
        if not self.across and self.crop == zyx(block.volume.tile):
            return [tile_start(block.volume, block.index)]  # there is no other
        cells, body = self._crops(block)
        ends = np.cumsum(body)
        marks = [raw * int(ends[-1]) // 2**64 for raw in self._random(self.crops_per_visit, _VISIT, visit).tolist()]
        chosen = cells[np.searchsorted(ends, marks, side="right")] * MAP_CELL + tile_start(block.volume, block.index)
        return [(z, y, x) for z, y, x in chosen.tolist()]

    def _weights_of(self, store: int, volume: Volume) -> NDArray[np.int64]:
        """Return the weight of the block of each superpatch of a volume, ``[n]``: the body of all its crops together.

        The sum over `_crops` of each. Each crop of the volume begins in one block, so all are summed up at once.
        """
        tile, grid = volume.tile // MAP_CELL, volume.grid
        reach = self.reach(volume)
        if any(e < edge for e, edge in zip(reach, self.crop, strict=True)):
            return np.zeros(volume.count, dtype=np.int64)
        cells = self.readers[store].read_map_region(volume.volume_id, "body", (0, 0, 0), reach)
        sums = window_sums(cells, self.cells)
        sums[sums < least_body(volume, self.crop, self._config)] = 0
        if not self.across:  # a crop that reaches into the next superpatch is none
            for axis, edge in enumerate(self.cells):
                crossing = np.arange(sums.shape[axis]) % tile > tile - edge
                sums[(slice(None),) * axis + (crossing,)] = 0
        z, y, x = grid
        blocks = np.zeros((z * tile, y * tile, x * tile), dtype=np.int64)
        blocks[tuple(map(slice, sums.shape))] = sums
        of_block = blocks.reshape(z, tile, y, tile, x, tile).sum(axis=(1, 3, 5))
        found: NDArray[np.int64] = of_block[tuple(volume.column(name) for name in ("iz", "iy", "ix"))]
        return found

    def _crops(self, block: _Block) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """List a block's crops with enough body: first cells in the block ``[n, 3]``, body (sum of cells) ``[n]``."""
        start = tile_start(block.volume, block.index)
        pairs = zip(self._extent(block.volume, start), self.crop, strict=True)
        z, y, x = (min(e, block.volume.tile + edge - MAP_CELL) for e, edge in pairs)
        if any(e < edge for e, edge in zip((z, y, x), self.crop, strict=True)):
            return np.empty((0, 3), dtype=np.int64), np.empty(0, dtype=np.int64)
        body = self.readers[block.store].read_map_region(block.volume.volume_id, "body", start, (z, y, x))
        sums = window_sums(body, self.cells)
        cells = np.argwhere(sums >= least_body(block.volume, self.crop, self._config))
        return cells, sums[tuple(cells.T)]

    def _extent(self, volume: Volume, start: Zyx) -> Zyx:
        """Return how far the crops of a block may reach from its first voxel."""
        if not self.across:
            return zyx(volume.tile)
        z, y, x = (end - s for end, s in zip(self.reach(volume), start, strict=True))
        return z, y, x

    def reach(self, volume: Volume) -> Zyx:
        """Return where the last crops of a volume end: beyond it by less than a cell, or as far as one crop needs."""
        if not self.across:
            z, y, x = (n * volume.tile for n in volume.grid)
        else:
            z, y, x = (max(-(-n // MAP_CELL) * MAP_CELL, edge) for n, edge in zip(volume.shape, self.crop, strict=True))
        return z, y, x

    def _random(self, count: int, *key: int) -> NDArray[np.uint64]:
        """Return raw Philox numbers of this key, since numpy keeps those equal from version to version (NEP 19)."""
        return np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=key)).random_raw(count)


def window_sums(cells: MapArray, window: Edges) -> NDArray[np.int64]:
    """Sum every window of a 3D array by cumulative sums: ``[t, t, t]`` to ``[t - k + 1, ...]``, k its edges."""
    sums = cells.astype(np.int64)
    for axis, k in enumerate(zyx(window)):
        ends = np.cumsum(sums, axis=axis)
        ends = np.concatenate([np.zeros_like(ends.take([0], axis)), ends], axis)
        last = np.arange(k, ends.shape[axis])
        sums = ends.take(last, axis) - ends.take(last - k, axis)
    return sums
