"""Between volumes and patches, and between HU and the numbers a model sees.

Shapes: B samples, Z Y X voxels, P patch edge, V = P^3 voxels of a patch, L tokens of the grid,
S of them chosen, E channels of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maesil.types import Intensity, Zyx


def patchify(volume_BZYX: Tensor, patch: int) -> Tensor:
    """Cut volumes into patches: ``[B, L, P^3]``, tokens and voxels in the order of `maesil.kernels`."""
    B, Z, Y, X = volume_BZYX.shape
    cut = volume_BZYX.reshape(B, Z // patch, patch, Y // patch, patch, X // patch, patch)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, -1, patch**3)


def unpatchify(tokens_BLV: Tensor, grid: Zyx, patch: int) -> Tensor:
    """Put patches ``[B, L, P^3]`` together again: ``[B, Z, Y, X]``, the inverse of `patchify`."""
    B, (gz, gy, gx) = len(tokens_BLV), grid
    cut = tokens_BLV.reshape(B, gz, gy, gx, patch, patch, patch)
    return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, gz * patch, gy * patch, gx * patch)


def expand_cells(cells: Tensor, edge: int) -> Tensor:
    """Repeat each cell of the last three axes ``edge`` times along z, y, x: from cells or tokens to voxels."""
    for axis in (-3, -2, -1):
        cells = cells.repeat_interleave(edge, dim=axis)
    return cells


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
