"""Between volumes and patches, and between HU and the numbers a model sees.

Shapes: B samples, Z Y X voxels, V voxels of a patch (one edge, or three z, y, x), L tokens of the grid,
S of them chosen, E channels of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maesil.types import Edges, Intensity, Zyx, zyx


def patchify(volume_BZYX: Tensor, patch: Edges) -> Tensor:
    """Cut volumes into patches: ``[B, L, V]``, tokens and voxels in the order of `maesil.kernels`."""
    (B, Z, Y, X), (PZ, PY, PX) = volume_BZYX.shape, zyx(patch)
    cut = volume_BZYX.reshape(B, Z // PZ, PZ, Y // PY, PY, X // PX, PX)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, -1, PZ * PY * PX)


def unpatchify(tokens_BLV: Tensor, grid: Zyx, patch: Edges) -> Tensor:
    """Put patches ``[B, L, V]`` together again: ``[B, Z, Y, X]``, the inverse of `patchify`."""
    B, (gz, gy, gx), (PZ, PY, PX) = tokens_BLV.shape[0], grid, zyx(patch)
    cut = tokens_BLV.reshape(B, gz, gy, gx, PZ, PY, PX)
    return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, gz * PZ, gy * PY, gx * PX)


def expand_cells(cells: Tensor, edges: Edges) -> Tensor:
    """Repeat each cell of the last three axes so often along z, y, x: from cells or tokens to voxels."""
    for axis, edge in zip((-3, -2, -1), zyx(edges), strict=True):
        cells = cells.repeat_interleave(edge, dim=axis)
    return cells


def halvings(patch: Edges) -> list[Zyx]:
    """Return the steps by which convolutions come from voxels to patches, finest first: a factor 1 or 2 an axis.

    Axes with fewer voxels are halved last, so that voxels that are thicker along one axis become cubes on the way.
    """
    steps = [edge.bit_length() - 1 for edge in zyx(patch)]
    most = max(steps)
    factors = [[2 if most - stage <= of_axis else 1 for of_axis in steps] for stage in range(most)]
    return [(z, y, x) for z, y, x in factors]


def to_hu(values: Tensor, intensity: Intensity) -> Tensor:
    """Turn normalised values back into HU, clipped to the window."""
    lo, hi = intensity.window
    return ((values * intensity.std + intensity.mean) * (hi - lo) + lo).clamp(lo, hi)


def tokens_at(tokens_BLE: Tensor, ids_BS: Tensor) -> Tensor:
    """Return the tokens of these ids: ``[B, S, E]``."""
    # Whole rows are copied; `gather` would go number by number.
    rows = token_rows(ids_BS, tokens_BLE.shape[1])
    return tokens_BLE.flatten(0, 1).index_select(0, rows).view(*ids_BS.shape, tokens_BLE.shape[2])


def with_tokens_at(tokens_BLE: Tensor, ids_BS: Tensor, values_BSE: Tensor) -> Tensor:
    """Return the tokens, those of these ids replaced: ``[B, L, E]``."""
    rows = token_rows(ids_BS, tokens_BLE.shape[1])
    return tokens_BLE.flatten(0, 1).index_copy(0, rows, values_BSE.flatten(0, 1)).view_as(tokens_BLE)


def token_rows(ids_BS: Tensor, length: int) -> Tensor:
    """Return where tokens ``ids_BS`` stand when the ``length`` tokens of all samples follow each other: ``[B * S]``."""
    first_B1 = torch.arange(len(ids_BS), device=ids_BS.device)[:, None] * length
    return (ids_BS.flatten(1) + first_B1).flatten()
