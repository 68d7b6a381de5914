"""The tier without reading: the training scans themselves stay on the device, and kernels cut the crops out of them.

Scans lie packed in one int16 array (`packed`). A batch is that array seen by every sample (nothing is copied) and the
first voxel of each crop in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from maesil.config.schema import TrainConfig
from maesil.data.crops import blank_outside_scan
from maesil.data.loader import Batch, CropLoader, PlacesInScans, samples_of_rank
from maesil.data.sampler import CropSampler, Draw
from maesil.data.sources import reading_threads
from maesil.errors import ResourceError
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.types import AIR_HU, HuArray, MapArray, Zyx


def open_loader(
    sampler: CropSampler, config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> CropLoader | ResidentLoader:
    """Return the loader that a configuration asks for; both give the same crops."""
    readers = reading_threads(sampler.readers, config.readers)
    if config.device_resident:
        return ResidentLoader(sampler, config.batch, readers, device, rank, world_size)
    return CropLoader(sampler, config.batch, readers, device=device, rank=rank, world_size=world_size)


class ResidentLoader:
    """Gives the batches of `maesil.data.loader.CropLoader`, cut from scans that were read once and stay on the device.

    ResourceError if they do not fit there, StoreError for damage, both at once.
    """

    def __init__(
        self,
        sampler: CropSampler,
        batch: int,
        readers: int = 2,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sampler, self._samples = sampler, samples_of_rank(batch, rank, world_size)
        self._device = torch.device(device)
        shape, places = packed([sampler.reach(volume) for _, volume in sampler.volumes])
        self._first = {v.volume_id: place for (_, v), place in zip(sampler.volumes, places, strict=True)}
        _require_room(shape, self._device)
        self._scans = torch.full(shape, AIR_HU, dtype=torch.int16, device=self._device)
        with ThreadPoolExecutor(readers) as pool:
            for _ in pool.map(self._load, *zip(*sampler.volumes, strict=True)):
                pass

    def __enter__(self) -> ResidentLoader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batches(self, start: int, stop: int) -> Iterator[Batch[PlacesInScans]]:
        """Yield the batches of steps ``start`` .. ``stop - 1``."""
        scans = self._scans.expand(len(self._samples), -1, -1, -1)
        for step in range(start, stop):
            draws = tuple(self._sampler.draw(step, sample) for sample in self._samples)
            valid, body = (
                torch.from_numpy(np.stack([self._cells(draw, name) for draw in draws])) for name in ("valid", "body")
            )
            flip = torch.tensor([draw.flip for draw in draws])
            origin = torch.tensor([self._place(draw) for draw in draws])
            yield Batch(PlacesInScans(scans, origin), valid, body, flip, draws)

    def _load(self, reader: SuperpatchReader, volume: Volume) -> None:
        hu = read_scan(reader, volume, self._sampler.reach(volume))
        z, y, x = (slice(a, a + n) for a, n in zip(self._first[volume.volume_id], hu.shape, strict=True))
        self._scans[z, y, x] = torch.from_numpy(hu).to(self._device)

    def _cells(self, draw: Draw, name: str) -> MapArray:
        reader = self._sampler.readers[draw.store]
        return reader.read_map_region(draw.volume.volume_id, name, draw.origin, self._sampler.crop)

    def _place(self, draw: Draw) -> list[int]:
        return [a + b for a, b in zip(self._first[draw.volume.volume_id], draw.origin, strict=True)]


_MOST_STACKS = 24
"""Stacks that are tried beside each other."""


def packed(sizes: Sequence[Zyx]) -> tuple[Zyx, list[Zyx]]:
    """Place boxes in one: its size, and the first voxel of each.

    Boxes of like height and width lie one behind the other along z, in stacks that stand beside each other in shelves.
    Of several numbers of stacks and shelves the one that takes least room is chosen; a single stack, as high and wide
    as the largest box, is among them.
    """
    counts = range(1, min(len(sizes), _MOST_STACKS) + 1)
    layouts = (_in_stacks(sizes, stacks, in_shelf) for stacks in counts for in_shelf in range(1, stacks + 1))
    return min(layouts, key=lambda layout: math.prod(layout[0]))


def _in_stacks(sizes: Sequence[Zyx], stacks: int, in_shelf: int) -> tuple[Zyx, list[Zyx]]:
    """Place boxes, the highest first, in about so many stacks of about equal depth, so many of them in a shelf."""
    by_height = sorted(range(len(sizes)), key=lambda number: sizes[number][1:], reverse=True)
    depth = -(-sum(z for z, _, _ in sizes) // stacks)
    piles: list[list[int]] = [[]]
    for number in by_height:
        if sum(sizes[other][0] for other in piles[-1]) >= depth:
            piles.append([])
        piles[-1].append(number)
    places: dict[int, Zyx] = {}
    top, shape = 0, (0, 0, 0)
    for start in range(0, len(piles), in_shelf):
        left = 0
        for pile in piles[start : start + in_shelf]:
            behind = 0
            for number in pile:
                places[number] = (behind, top, left)
                behind += sizes[number][0]
            left += max(sizes[number][2] for number in pile)
            shape = max(shape[0], behind), shape[1], max(shape[2], left)
        top += max(sizes[number][1] for number in piles[start])  # the highest of its shelf
    return (shape[0], top, shape[2]), [places[number] for number in range(len(sizes))]


def read_scan(reader: SuperpatchReader, volume: Volume, size: tuple[int, int, int]) -> HuArray:
    """Read a scan in full, int16 HU of ``size`` (multiples of 8): air beyond the volume and outside the scan."""
    hu = reader.read_region(volume.volume_id, (0, 0, 0), size)
    blank_outside_scan(hu, reader.read_map_region(volume.volume_id, "valid", (0, 0, 0), size))
    return hu


def _require_room(shape: tuple[int, int, int], device: torch.device) -> None:
    """Refuse scans that would leave a GPU no room for a model."""
    needed = 2 * shape[0] * shape[1] * shape[2]
    if device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(device)[0]) * 3 // 4:
        raise ResourceError(
            f"train.device_resident: the scans need {needed / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are free; "
            "train without it, or with --ram"
        )
