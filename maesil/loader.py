"""From draws to batches: threads read ahead of the step into a ring of buffers.

Shapes: B samples, c crop edge (voxels), k = c / 8 cells of the maps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maesil.data import blank_outside_scan, tile_start
from maesil.errors import UsageError
from maesil.sampler import CropSampler, Draw
from maesil.types import MAP_CELL, HuArray


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


def samples_of_rank(batch: int, rank: int, world_size: int) -> range:
    """Return which samples of a step's batch one of several processes reads: together all of them, each once."""
    if batch % world_size:
        raise UsageError(f"train.batch={batch}: expected a multiple of the {world_size} processes of this run")
    share = batch // world_size
    return range(rank * share, (rank + 1) * share)


class CropLoader:
    """Reads the batches of coming steps on a few threads into a ring of buffers.

    ``with CropLoader(...) as loader: for batch in loader.batches(start, stop)``. What a reader raises (StoreError for
    damage) is raised where the batch is asked for; leaving the block ends the threads. With ``world_size`` processes
    each reads its share of the ``batch`` samples of a step: together they see what a single process would.
    """

    def __init__(
        self,
        sampler: CropSampler,
        batch: int,
        readers: int = 2,
        ahead: int = 2,
        pin: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sampler, self._samples = sampler, samples_of_rank(batch, rank, world_size)
        batch = len(self._samples)
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
                    reading[ahead] = [
                        self._pool.submit(self._fill, ahead, sample, place)
                        for place, sample in enumerate(self._samples)
                    ]
            draws = tuple(future.result() for future in reading[step])
            flip = torch.tensor([draw.flip for draw in draws])
            yield Batch(*self._ring[step % len(self._ring)], flip=flip, draws=draws)
            del reading[step]

    def _fill(self, step: int, sample: int, place: int) -> Draw:
        draw = self._sampler.draw(step, sample)
        crop = self._sampler.crop
        hu, valid, body = (buffer[place].numpy() for buffer in self._ring[step % len(self._ring)])
        if crop == draw.volume.tile:
            draw.reader.read_superpatch(draw.volume.volume_id, draw.tile, hu)
        else:
            superpatch = draw.reader.read_superpatch(draw.volume.volume_id, draw.tile, self._scratch(draw.volume.tile))
            hu[:] = superpatch[tuple(slice(o, o + crop) for o in draw.offset)]
        tile_z, tile_y, tile_x = tile_start(draw.volume, draw.tile)
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
