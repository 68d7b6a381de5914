"""The tier without reading: the training scans themselves stay on the device, and kernels cut the crops out of them.

Scans lie one behind the other along z in one int16 array, as wide as the widest of them. A batch is that array seen by
every sample (nothing is copied) and the first voxel of each crop in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from maesil.config.schema import TrainConfig
from maesil.data.crops import blank_outside_scan
from maesil.data.loader import Batch, CropLoader, samples_of_rank
from maesil.data.sampler import CropSampler, Draw
from maesil.errors import ResourceError
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.types import AIR_HU, HuArray, MapArray


def open_loader(
    sampler: CropSampler, config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> CropLoader | ResidentLoader:
    """Return the loader that a configuration asks for; both give the same crops."""
    if config.device_resident:
        return ResidentLoader(sampler, config.batch, config.readers, device, rank, world_size)
    return CropLoader(sampler, config.batch, config.readers, device=device, rank=rank, world_size=world_size)


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
        reaches = [sampler.reach(volume) for _, volume in sampler.volumes]
        first = np.cumsum([0, *(z for z, _, _ in reaches)])
        self._first_slice = {v.volume_id: int(z) for (_, v), z in zip(sampler.volumes, first[:-1], strict=True)}
        shape = int(first[-1]), max(y for _, y, _ in reaches), max(x for _, _, x in reaches)
        _require_room(shape, self._device)
        self._scans = torch.full(shape, AIR_HU, dtype=torch.int16, device=self._device)
        with ThreadPoolExecutor(readers) as pool:
            for _ in pool.map(self._load, *zip(*sampler.volumes, strict=True)):
                pass

    def __enter__(self) -> ResidentLoader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps ``start`` .. ``stop - 1``."""
        scans = self._scans.expand(len(self._samples), -1, -1, -1)
        for step in range(start, stop):
            draws = tuple(self._sampler.draw(step, sample) for sample in self._samples)
            valid, body = (
                torch.from_numpy(np.stack([self._cells(draw, name) for draw in draws])) for name in ("valid", "body")
            )
            flip = torch.tensor([draw.flip for draw in draws])
            origin = torch.tensor([self._place(draw) for draw in draws])
            yield Batch(scans, valid, body, flip, draws, origin)

    def _load(self, reader: SuperpatchReader, volume: Volume) -> None:
        hu = read_scan(reader, volume, self._sampler.reach(volume))
        z, (depth, height, width) = self._first_slice[volume.volume_id], hu.shape
        self._scans[z : z + depth, :height, :width] = torch.from_numpy(hu).to(self._device)

    def _cells(self, draw: Draw, name: str) -> MapArray:
        size = (self._sampler.crop,) * 3
        return draw.reader.read_map_region(draw.volume.volume_id, name, draw.origin, size)

    def _place(self, draw: Draw) -> list[int]:
        z, y, x = draw.origin
        return [self._first_slice[draw.volume.volume_id] + z, y, x]


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
