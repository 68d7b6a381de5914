"""A whole scan through an encoder: crops that overlap, one grid of tokens, one pooled vector.

Shapes: Z Y X voxels, c edges of a crop, g tokens along an axis of the scan, k along an axis of a crop, D
channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maesil.config.schema import ModelConfig
from maesil.data.crops import Crop, blank_outside_scan, patch_shares
from maesil.evaluation.reconstruct import blending_weights
from maesil.geometry import Affine
from maesil.models.encoders import Backbone
from maesil.store.writer import Image
from maesil.types import AIR_HU, MAP_CELL, MapArray, Zyx

_CROPS_AT_ONCE = 4


@dataclass(frozen=True)
class ScanEmbedding:
    """What an encoder makes of one scan."""

    tokens: NDArray[np.float32]
    """``[gz, gy, gx, D]``: token ``[iz, iy, ix]`` is the patch whose first voxel is ``(iz, iy, ix)`` times the patch's
    edges. Zeros where no voxel nearby is of the scan."""
    valid: NDArray[np.float32]
    """Share (0..1) of each patch inside the scan, ``[gz, gy, gx]``; no token counts whose share is 0."""
    body: NDArray[np.float32]
    """The same for the patient's body."""
    affine: Affine
    """From a token ``[iz, iy, ix, 1]`` to the centre of its patch (mm, DICOM's LPS)."""
    vector: NDArray[np.float32] | None
    """The mean of the tokens, ``[D]``, each counting by its share of body; where there is none, by ``valid``. None
    where no voxel is valid."""
    weighted_by: str
    """``body``, ``valid`` or ``nothing``."""


@torch.no_grad()
def embed_scan(encoder: Backbone, scan: Image) -> ScanEmbedding:
    """Encode a scan in crops that overlap by half: a token is the mean of what each crop makes of its patch.

    In this mean a token counts by its distance from the faces of the crop, since those near a face see half of their
    surroundings only. Crops without any valid voxel are left out.
    """
    config, cover = encoder.config, _Cover.of(scan.shape, encoder.config)
    total = torch.zeros(*cover.grid, encoder.width, dtype=torch.float64)
    weight = torch.zeros(*cover.grid, 1, dtype=torch.float64)
    near_a_face = blending_weights(config.grid).double()[..., None]
    origins = [origin for origin in cover.origins if cells_at(scan.valid, origin, config.crop_zyx).any()]
    for start in range(0, len(origins), _CROPS_AT_ONCE):
        some = origins[start : start + _CROPS_AT_ONCE]
        crops = [cut(scan, origin, config.crop_zyx) for origin in some]
        for origin, tokens_LD in zip(some, encoded(encoder, crops), strict=True):
            places = zip(origin, config.patch_zyx, config.grid, strict=True)
            box = tuple(slice(at // edge, at // edge + k) for at, edge, k in places)
            total[box] += near_a_face * tokens_LD.view(*config.grid, -1)
            weight[box] += near_a_face
    tokens = (total / weight.clamp_min(torch.finfo(torch.float64).tiny)).float().numpy()
    return _within_scan(encoder, scan, tokens, cover)


def encoded(encoder: Backbone, crops: Sequence[Crop]) -> Tensor:
    """Return the tokens of some crops, float64 ``[B, L, D]`` on the CPU."""
    device = next(encoder.parameters()).device
    hu_BZYX = torch.from_numpy(np.stack([crop.hu for crop in crops])).to(device)
    return encoder.forward_features(hu_BZYX).double().cpu()


def _within_scan(encoder: Backbone, scan: Image, tokens: NDArray[np.float32], cover: _Cover) -> ScanEmbedding:
    """Cut the grid to the patches that hold a voxel of the scan, and pool them."""
    patch = encoder.config.patch_zyx
    z, y, x = (-(-n // edge) for n, edge in zip(scan.shape, patch, strict=True))
    shares = {}
    for name in ("body", "valid"):
        cells = cells_at(getattr(scan, name), (0, 0, 0), cover.shape)
        of_patches = patch_shares(torch.from_numpy(cells)[None], patch)[0]
        shares[name] = of_patches.view(*cover.grid)[:z, :y, :x].numpy()
    tokens = np.ascontiguousarray(tokens[:z, :y, :x])
    vector, weighted_by = pooled(tokens, shares)
    affine = scan.affine @ np.diag([*patch, 1.0])
    affine[:3, 3] += scan.affine[:3, :3] @ [(edge - 1) / 2 for edge in patch]
    return ScanEmbedding(tokens, shares["valid"], shares["body"], affine, vector, weighted_by)


def pooled(
    tokens: NDArray[np.float32], shares: dict[str, NDArray[np.float32]]
) -> tuple[NDArray[np.float32] | None, str]:
    """Return the mean of tokens ``[..., D]`` by the first of the ``shares`` ``[...]`` that is not zero all over."""
    for name, share in shares.items():
        if share.any():
            flat = share.reshape(-1).astype(np.float64)
            mean = flat @ tokens.reshape(len(flat), -1).astype(np.float64) / flat.sum()
            return mean.astype(np.float32), name
    return None, "nothing"


@dataclass(frozen=True)
class _Cover:
    """Crops at multiples of patches and cells that cover a scan: those at its end reach beyond it."""

    shape: Zyx
    """Voxels that they cover."""
    grid: Zyx
    """Tokens."""
    origins: tuple[Zyx, ...]
    """First voxels of crops that overlap by half, or the next unit above it; the last end with the shape."""

    @classmethod
    def of(cls, shape: Zyx, config: ModelConfig) -> _Cover:
        units = [math.lcm(edge, MAP_CELL) for edge in config.patch_zyx]
        covered, axes = [], []
        for n, edge, unit in zip(shape, config.crop_zyx, units, strict=True):
            covered.append(max(edge, -(-n // unit) * unit))
            step = max(unit, edge // 2 // unit * unit)
            axes.append([*range(0, covered[-1] - edge, step), covered[-1] - edge])
        z, y, x = covered
        gz, gy, gx = (n // edge for n, edge in zip(covered, config.patch_zyx, strict=True))
        return cls((z, y, x), (gz, gy, gx), tuple(product(*axes)))


def cut(scan: Image, origin: Zyx, size: Zyx) -> Crop:
    """Cut a crop at multiples of 8; voxels of cells without a valid one, and those beyond the scan, are air."""
    inside = np.asarray(scan.hu[tuple(slice(at, at + edge) for at, edge in zip(origin, size, strict=True))])
    hu = np.full(size, AIR_HU, dtype=np.int16)
    hu[tuple(slice(0, n) for n in inside.shape)] = inside
    valid, body = cells_at(scan.valid, origin, size), cells_at(scan.body, origin, size)
    blank_outside_scan(hu, valid)
    return Crop("", origin, hu, valid, body)


def cells_at(cells: MapArray, origin: Zyx, size: Zyx) -> MapArray:
    """Return the part of a map under a box at multiples of 8; 0 beyond the scan."""
    places = zip(origin, size, strict=True)
    inside = cells[tuple(slice(at // MAP_CELL, (at + edge) // MAP_CELL) for at, edge in places)]
    return np.pad(inside, [(0, edge // MAP_CELL - n) for edge, n in zip(size, inside.shape, strict=True)])
