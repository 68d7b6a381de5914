"""From draws to batches: threads read ahead of the step into a ring of buffers.

Shapes: B samples, c crop edge (voxels), k = c / 8 cells of the maps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maesil.blocks import Block, Buffers
from maesil.errors import UsageError
from maesil.sampler import CropSampler, Draw
from maesil.types import MAP_CELL


@dataclass(frozen=True)
class Batch:
    """One step's crops. The tensors are buffers of a ring: they hold until the next batch is asked for."""

    hu: Tensor
    """int16 HU ``[B, c, c, c]``, not mirrored yet; with ``origin``, whatever the crops are to be cut from."""
    valid: Tensor
    """uint8 ``[B, k, k, k]``: share, 0..255, of each cell inside the scan."""
    body: Tensor
    """uint8 ``[B, k, k, k]``: share inside the patient's body."""
    flip: Tensor
    """bool ``[B, 3]``: which axes z, y, x the model is to see mirrored."""
    draws: tuple[Draw, ...]
    origin: Tensor | None = None
    """int64 ``[B, 3]``: first voxel of each crop in ``hu``, if that holds whole scans."""


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
    each reads its share of the ``batch`` samples of a step: together they see what a single process would. For a CUDA
    ``device`` the ring is pinned, so that `maesil.trainer` can copy it while the step before computes.

    Memory: ``ahead + 1`` batches, and the superpatches of one visit a sample (2x2x2 of them for crops across).
    """

    def __init__(
        self,
        sampler: CropSampler,
        batch: int,
        readers: int = 2,
        ahead: int = 2,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sampler, self._samples = sampler, samples_of_rank(batch, rank, world_size)
        self._process = os.getpid()
        B, c, k = len(self._samples), sampler.crop, sampler.crop // MAP_CELL
        self._ring = [
            (
                _buffer((B, c, c, c), torch.device(device)),
                torch.empty(B, k, k, k, dtype=torch.uint8),
                torch.empty(B, k, k, k, dtype=torch.uint8),
            )
            for _ in range(ahead + 1)
        ]
        self._buffers = Buffers()
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="maesil-reader")

    def __enter__(self) -> CropLoader:
        return self

    def __exit__(self, *_: object) -> None:
        if os.getpid() == self._process:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps ``start`` .. ``stop - 1``; RuntimeError in a process forked off meanwhile."""
        blocks: dict[int, Block] = {}
        reading: dict[int, list[Future[Draw]]] = {}
        for step in range(start, stop):
            if os.getpid() != self._process:
                raise RuntimeError("a loader's threads do not survive a fork; make a loader in the new process")
            for ahead in range(step, min(stop, step + len(self._ring))):
                if ahead not in reading:
                    reading[ahead] = self._read_ahead(ahead, blocks)
            draws = tuple(future.result() for future in reading.pop(step))
            flip = torch.tensor([draw.flip for draw in draws])
            yield Batch(*self._ring[step % len(self._ring)], flip=flip, draws=draws)
            for sample in self._samples:
                visit, _ = self._sampler.visit(step, sample)
                if self._sampler.visit(step + 1, sample)[0] != visit:
                    blocks.pop(visit).release()

    def _read_ahead(self, step: int, blocks: dict[int, Block]) -> list[Future[Draw]]:
        """Let the threads fill the ring's buffers of one step, beginning new visits where it does."""
        filling = []
        for place, sample in enumerate(self._samples):
            draw = self._sampler.draw(step, sample)
            block = blocks.setdefault(draw.visit, Block(draw.reader, draw.volume, self._buffers))
            filling.append(self._pool.submit(self._fill, draw, block, step % len(self._ring), place))
        return filling

    def _fill(self, draw: Draw, block: Block, slot: int, place: int) -> Draw:
        hu, valid, body = (buffer[place].numpy() for buffer in self._ring[slot])
        block.cut(draw.origin, hu)
        size = (self._sampler.crop,) * 3
        for name, cells in (("valid", valid), ("body", body)):
            cells[:] = draw.reader.read_map_region(draw.volume.volume_id, name, draw.origin, size)
        return draw


def _buffer(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int16 memory of the host: pinned for a GPU, else numpy's, which asks for large pages as torch does not."""
    if device.type == "cuda":
        return torch.empty(shape, dtype=torch.int16, pin_memory=True)
    return torch.from_numpy(np.empty(shape, dtype=np.int16))
