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
    volume = volume_BZYX.contiguous()
    corner_BN = _patch_corners(volume, ids_BN, patch, origin, flip, superpatch_edges(volume, size))
    # A view of every box of P^3 voxels, by the number of its first voxel: each patch is then one strided copy.
    _, *strides = volume.stride()
    boxes = volume.numel() - (patch - 1) * sum(strides)
    every_box = volume.as_strided((boxes, patch, patch, patch), (1, *strides))
    patch_BNV = every_box.index_select(0, corner_BN.flatten()).reshape(*ids_BN.shape, patch**3)
    return patch_BNV if flip is None else _mirror(patch_BNV, flip, patch)


def _patch_corners(
    volume: Tensor, ids_BN: Tensor, patch: int, origin: Tensor | None, flip: Tensor | None, edges: tuple[int, int, int]
) -> Tensor:
    """Number the first voxel of each patch, ``[B, N]``, counting all voxels of the batch."""
    _, gy, gx = (edge // patch for edge in edges)
    index_zyx = (ids_BN // (gy * gx), ids_BN // gx % gy, ids_BN % gx)
    batch_stride, *strides = volume.stride()
    corner_BN = torch.arange(len(volume), device=volume.device)[:, None] * batch_stride
    for axis, (index, edge, stride) in enumerate(zip(index_zyx, edges, strides, strict=True)):
        start = index * patch if flip is None else torch.where(
            flip[:, axis, None], edge - patch - index * patch, index * patch
        )  # fmt: skip
        corner_BN = corner_BN + stride * (start if origin is None else start + origin[:, axis, None])
    return corner_BN


def _mirror(patch_BNV: Tensor, flip: Tensor, patch: int) -> Tensor:
    """Mirror the voxels inside each patch along the axes its sample's ``flip`` names."""
    forward = torch.arange(patch, device=flip.device)
    z, y, x = torch.where(flip[..., None], patch - 1 - forward, forward).unbind(1)
    source_BV = ((z[:, :, None, None] * patch + y[:, None, :, None]) * patch + x[:, None, None, :]).flatten(1)
    return patch_BNV.gather(2, source_BV[:, None].expand_as(patch_BNV))


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
