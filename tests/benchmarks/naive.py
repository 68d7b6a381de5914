"""The three operations as one writes them first (facebookresearch/mae): float volumes, all patches, float targets."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_patches(volume: Tensor, patch: int, window: tuple[float, float], mean: float, std: float) -> Tensor:
    """Normalise whole volumes and cut them into all their patches."""
    lo, hi = window
    value = ((volume.float().clamp(lo, hi) - lo) / (hi - lo) - mean) / std
    batch, z, y, x = volume.shape
    cut = value.reshape(batch, z // patch, patch, y // patch, patch, x // patch, patch)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, patch**3)


def rows_of(tokens: Tensor, ids: Tensor) -> Tensor:
    """Take tokens by number."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def gather_patches(
    volume: Tensor,
    ids: Tensor,
    *,
    patch_size: int,
    window: tuple[float, float],
    mean: float,
    std: float,
    dtype: torch.dtype,
    **_: object,
) -> Tensor:
    """Patchify, then gather."""
    return rows_of(naive_patches(volume, patch_size, window, mean, std), ids).to(dtype)


def unshuffle_tokens(
    visible: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, ids_subset: Tensor | None = None
) -> Tensor:
    """Append mask tokens, then gather."""
    batch, shown, width = visible.shape
    hidden = mask_token.to(visible.dtype).expand(batch, len(pos_embed) - shown, width)
    tokens = rows_of(torch.cat([visible, hidden], dim=1), ids_restore) + pos_embed.to(visible.dtype)
    return tokens if ids_subset is None else rows_of(tokens, ids_subset)


def masked_reconstruction_loss(
    pred: Tensor,
    volume: Tensor,
    ids: Tensor,
    *,
    patch_size: int,
    window: tuple[float, float],
    mean: float,
    std: float,
    weight: Tensor,
    **_: object,
) -> Tensor:
    """All targets in float, then those of the hidden patches."""
    target = rows_of(naive_patches(volume, patch_size, window, mean, std), ids)
    error = ((pred.float() - target) ** 2).mean(dim=-1)
    return (error * weight).sum() / weight.sum()
