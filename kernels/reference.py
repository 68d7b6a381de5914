"""The definitions: each operation in plain PyTorch, exact in float64; the CPU path and each kernel's oracle.

Shapes: B samples; Z Y X voxels of the int16 volume; P patch edge, V = P^3; L tokens of the grid, N visible,
M hidden, S chosen; D width. Token ``l`` of grid ``(gz, gy, gx)`` is ``(iz * gy + iy) * gx + ix``; the voxels
of a patch are flattened ``z, y, x``. A superpatch is the box of ``size`` voxels at ``origin`` (default: the
whole volume), mirrored along the axes that ``flip`` names *after* it is cut out.
"""

from __future__ import annotations

import torch
from torch import Tensor

Window = tuple[float, float] | Tensor
Size = int | tuple[int, int, int]


def gather_patches(
    volume_BZYX: Tensor,
    ids_BN: Tensor,
    *,
    patch_size: int,
    window: Window,
    mean: float,
    std: float,
    dtype: torch.dtype,
    origin: Tensor | None = None,
    flip: Tensor | None = None,
    size: Size | None = None,
) -> Tensor:
    """Cut the patches ``ids_BN`` out of the volume: ``[B, N, P^3]`` of ``dtype``, windowed and normalised."""
    value = _patch_voxels(volume_BZYX, ids_BN, patch_size, origin, flip, size)
    value = value.to(torch.promote_types(dtype, torch.float32))
    lo, hi = _window_bounds(window, value)
    value = value.clamp(lo, hi).sub_(lo).div_(hi - lo).sub_(mean).div_(std)
    return value.to(dtype)


def unshuffle_tokens(
    visible_BND: Tensor,
    mask_token_D: Tensor,
    pos_embed_LD: Tensor,
    ids_restore_BL: Tensor,
    ids_subset_BS: Tensor | None = None,
) -> Tensor:
    """Put visible tokens back in place, the mask token elsewhere, add positions: ``[B, L or S, D]``."""
    B, N, D = visible_BND.shape
    positions = torch.arange(ids_restore_BL.shape[1], device=ids_restore_BL.device).expand(B, -1)
    positions = positions if ids_subset_BS is None else ids_subset_BS
    source = ids_restore_BL.gather(1, positions)[..., None]
    visible = visible_BND.gather(1, source.clamp(max=N - 1).expand(-1, -1, D))
    tokens = torch.where(source < N, visible, mask_token_D.to(visible.dtype))
    return tokens + pos_embed_LD.to(visible.dtype)[positions]


def masked_reconstruction_loss(
    pred_BMV: Tensor,
    volume_BZYX: Tensor,
    ids_masked_BM: Tensor,
    *,
    patch_size: int,
    window: Window,
    mean: float,
    std: float,
    norm_patch: bool = False,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    origin: Tensor | None = None,
    flip: Tensor | None = None,
    size: Size | None = None,
) -> Tensor:
    """Average the squared error of the hidden patches, weighted: a scalar, float32 (float64 for float64)."""
    pred = pred_BMV.to(torch.promote_types(pred_BMV.dtype, torch.float32))
    target = gather_patches(
        volume_BZYX, ids_masked_BM, patch_size=patch_size, window=window, mean=mean, std=std,
        dtype=pred.dtype, origin=origin, flip=flip, size=size,
    )  # fmt: skip
    if norm_patch:
        variance, average = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - average) / (variance + eps).sqrt()
    error_BM = (pred - target).square().mean(dim=-1)
    weight_BM = torch.ones_like(error_BM) if weight is None else weight.to(pred.dtype)
    return (error_BM * weight_BM).sum() / weight_BM.sum().clamp_min(torch.finfo(pred.dtype).tiny)


def _patch_voxels(
    volume_BZYX: Tensor,
    ids_BN: Tensor,
    patch: int,
    origin: Tensor | None,
    flip: Tensor | None,
    size: Size | None,
) -> Tensor:
    """Look up the raw voxels ``[B, N, P^3]`` of patches ``ids_BN`` of the cropped and mirrored volume."""
    edges = superpatch_edges(volume_BZYX, size)
    _, gy, gx = (edge // patch for edge in edges)
    index_zyx = (ids_BN // (gy * gx), ids_BN // gx % gy, ids_BN % gx)
    voxel_zyx = []
    for axis, (index, edge) in enumerate(zip(index_zyx, edges, strict=True)):
        voxel_BNP = index[..., None] * patch + torch.arange(patch, device=ids_BN.device)
        if flip is not None:
            voxel_BNP = torch.where(flip[:, axis, None, None], edge - 1 - voxel_BNP, voxel_BNP)
        voxel_zyx.append(voxel_BNP if origin is None else voxel_BNP + origin[:, axis, None, None])
    sample = torch.arange(len(ids_BN), device=ids_BN.device)[:, None, None, None, None]
    z, y, x = voxel_zyx
    z, y, x = z[:, :, :, None, None], y[:, :, None, :, None], x[:, :, None, None, :]
    return volume_BZYX[sample, z, y, x].flatten(2)


def _window_bounds(window: Window, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shape ``(lo, hi)`` of one window, or of ``[B, 2]`` windows, to broadcast against ``[B, N, P^3]``."""
    bounds = torch.as_tensor(window, dtype=like.dtype, device=like.device)
    lo, hi = bounds.unbind(-1)
    return lo.reshape(-1, 1, 1), hi.reshape(-1, 1, 1)


def superpatch_edges(volume_BZYX: Tensor, size: Size | None) -> tuple[int, int, int]:
    """Resolve the superpatch's edges ``(z, y, x)`` in voxels: ``size``, or the volume's own."""
    if size is None:
        _, z, y, x = volume_BZYX.shape
        return z, y, x
    return (size, size, size) if isinstance(size, int) else size
