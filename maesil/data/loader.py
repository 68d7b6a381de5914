"""From draws to batches: threads read ahead of the step into a ring of buffers.

Shapes: B samples, c crop edge (voxels), k = c / 8 cells of the maps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from maesil.data.blocks import CropBuffer, work_of_visit
from maesil.data.sampler import CropSampler, Draw
from maesil.errors import UsageError


@dataclass(frozen=True)
class PlacesInScans:
    """Where the crops of a batch lie in scans that stay on the device."""

    scans: Tensor
    """int16 HU ``[B, Z, Y, X]``, one memory for all samples."""
    origin: Tensor
    """int64 ``[B, 3]``: the first voxel of each crop."""


Voxels = TypeVar("Voxels", bound=Tensor | PlacesInScans, covariant=True)


@dataclass(frozen=True)
class Batch(Generic[Voxels]):
    """One step's crops. The tensors are buffers of a ring: they hold until the next batch is asked for."""

    hu: Voxels
    """The crops, int16 HU ``[B, c, c, c]``, not mirrored yet; or where they are to be cut."""
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
    each reads its share of the ``batch`` samples of a step: together they see what a single process would. For a CUDA
    ``device`` the ring is pinned, so that `maesil.training.trainer` can copy it while the step before computes.

    Memory: ``ahead`` batches and one for each crop of a visit, and a superpatch a thread.
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
        self._process, self._ahead = os.getpid(), ahead
        B, c, k = len(self._samples), sampler.crop, sampler.cells
        self._ring = [
            (
                _buffer((B, *c), torch.device(device)),
                torch.empty(B, *k, dtype=torch.uint8),
                torch.empty(B, *k, dtype=torch.uint8),
            )
            for _ in range(ahead + sampler.crops_per_visit)
        ]
        self._places = [
            [CropBuffer(*crop) for crop in zip(*(part.numpy() for part in batch), strict=True)] for batch in self._ring
        ]
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="maesil-reader")

    def __enter__(self) -> CropLoader:
        return self

    def __exit__(self, *_: object) -> None:
        if os.getpid() == self._process:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, start: int, stop: int) -> Iterator[Batch[Tensor]]:
        """Yield the batches of steps ``start`` .. ``stop - 1``; RuntimeError in a process forked off meanwhile."""
        visits: dict[int, _Visit] = {}
        for step in range(start, stop):
            if os.getpid() != self._process:
                raise RuntimeError("a loader's threads do not survive a fork; make a loader in the new process")
            for coming in range(step, min(stop, step + self._ahead + 1)):
                self._begin_visits(coming, stop, visits)
            now = [visits[self._sampler.visit(step, sample)[0]] for sample in self._samples]
            draws = tuple(visit.draw(step) for visit in now)
            flip = torch.tensor([draw.flip for draw in draws])
            yield Batch(*self._ring[step % len(self._ring)], flip=flip, draws=draws)
            for visit in now:
                if visit.last == step:
                    del visits[visit.number]

    def _begin_visits(self, step: int, stop: int, visits: dict[int, _Visit]) -> None:
        """Let the threads cut all crops of the visits that begin with a step, into the ring's buffers."""
        for place, sample in enumerate(self._samples):
            number, turn = self._sampler.visit(step, sample)
            if number not in visits:
                steps = range(step, min(stop, step + self._sampler.crops_per_visit - turn))
                draws = [self._sampler.draw(later, sample) for later in steps]
                buffers = [self._places[later % len(self._ring)][place] for later in steps]
                reading = [self._pool.submit(work) for work in work_of_visit(self._sampler.readers, draws, buffers)]
                visits[number] = _Visit(number, steps, draws, reading)


@dataclass(frozen=True)
class _Visit:
    """A visit that threads are working on, or have done."""

    number: int
    steps: range
    draws: list[Draw]
    reading: list[Future[None]]

    @property
    def last(self) -> int:
        return self.steps[-1]

    def draw(self, step: int) -> Draw:
        """Wait until the crops are cut, raising what a reader raised; return the one of a step."""
        while self.reading:
            self.reading.pop().result()
        return self.draws[step - self.steps.start]


def _buffer(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int16 memory of the host: pinned for a GPU, else numpy's, which asks for large pages as torch does not."""
    if device.type == "cuda":
        return torch.empty(shape, dtype=torch.int16, pin_memory=True)
    return torch.from_numpy(np.empty(shape, dtype=np.int16))
