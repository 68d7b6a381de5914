"""Crops at fixed places: the grid that evaluation goes over, the crops that validation looks at.

Shapes: B samples, c crop edges (voxels; a cube has one), k = c / 8 cells of the maps, L patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from maesil.config.schema import TrainConfig
from maesil.data.sources import Sources
from maesil.store.grid import tile_at
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.types import AIR_HU, MAP_CELL, Edges, HuArray, MapArray, Zyx, zyx


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
    reader: SuperpatchReader, volume_ids: Iterable[str], crop: Edges, min_valid: float = 0.0
) -> Iterator[Crop]:
    """Yield the aligned grid of crops of each volume, z y x, where any voxel is valid (and ``min_valid`` of all)."""
    for volume_id in volume_ids:
        for origin in grid_origins(reader.volumes[volume_id], crop):
            valid = reader.read_map_region(volume_id, "valid", origin, zyx(crop))
            if valid.any() and valid.mean() >= 255 * min_valid:
                yield read_crop(reader, volume_id, origin, crop)


def grid_origins(volume: Volume, crop: Edges) -> Iterator[Zyx]:
    """Yield the first voxels of the aligned grid of crops that covers a volume, in the order z, y, x."""
    yield from product(*(range(0, n, edge) for n, edge in zip(volume.shape, zyx(crop), strict=True)))


def validation_crops(sources: Sources, groups: Iterable[str], crop: Edges, config: TrainConfig) -> list[Crop]:
    """Read crops of the held-out patients with enough body: at most so many, spread evenly, always the same."""
    size = zyx(crop)
    places = [
        (reader, volume.volume_id, origin)
        for reader, volume in sources.volumes(groups)
        for origin in grid_origins(volume, crop)
        if sources.takes(reader, volume, tile_at(volume, origin))
        and reader.read_map_region(volume.volume_id, "body", origin, size).sum(dtype=np.int64)
        >= least_body(volume, crop, config)
    ]
    count = min(len(places), config.validation_crops)
    chosen = [places[i * len(places) // count] for i in range(count)]
    return [read_crop(*place, crop) for place in chosen]


def least_body(volume: Volume, crop: Edges, config: TrainConfig) -> float:
    """Return the least sum over the cells of a crop's body map (0..255 each) with which it is trained on.

    With ``train.thin=pad`` the body share of a scan thinner than a crop counts within the scan. Infinite for a scan
    thinner than a cell of the maps: none of its patches would count.
    """
    if min(volume.shape) < MAP_CELL:
        return math.inf
    cells = [edge // MAP_CELL for edge in zyx(crop)]
    scan = [-(-n // MAP_CELL) for n in volume.shape]
    within = list(map(min, cells, scan)) if config.thin == "pad" else cells
    return max(config.min_body * 255 * math.prod(within), 1)


def patch_shares(cells_BZYX: Tensor, patch: Edges, flip: Tensor | None = None) -> Tensor:
    """Turn map cells (uint8 ``[B, k, k, k]``) into the share of each patch, float32 ``[B, L]`` in 0..1.

    With ``flip`` bool ``[B, 3]`` the shares are those of the mirrored crop, in the order of its tokens. A patch smaller
    than a cell gets the share of its cell.
    """
    shares = cells_BZYX.float() / 255
    if flip is not None:
        mirrored = [one.flip(on.nonzero().flatten().tolist()) for one, on in zip(shares, flip, strict=True)]
        shares = torch.stack(mirrored)
    edges = zyx(patch)
    shares = functional.avg_pool3d(shares[:, None], [max(1, edge // MAP_CELL) for edge in edges])[:, 0]
    for axis, edge in enumerate(edges, start=1):
        shares = shares.repeat_interleave(max(1, MAP_CELL // edge), dim=axis)
    return shares.flatten(1)


def whole_patches(cells_BZYX: Tensor, patch: Edges, flip: Tensor | None = None) -> Tensor:
    """Return which patches lie wholly inside the scan: float32 ``[B, L]`` of 0 and 1; arguments as of `patch_shares`.

    They alone count in a loss: a patch that lies partly beyond the scan holds -1024 HU that nobody measured.
    """
    return (patch_shares(cells_BZYX, patch, flip) == 1).float()


def read_crop(reader: SuperpatchReader, volume_id: str, origin: Zyx, crop: Edges) -> Crop:
    """Read the crop of a volume at any origin of multiples of 8, cells without any valid voxel set to air."""
    size = zyx(crop)
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
