"""The definitions: each operation in plain PyTorch, exact in float64; the CPU path and each kernel's oracle.

Shapes: B samples; Z Y X voxels of the int16 volume; V voxels of a patch, whose size is one edge or (z, y, x);
L tokens of the grid, N visible, M hidden, S chosen; D width. Token ``l`` of grid ``(gz, gy, gx)`` is
``(iz * gy + iy) * gx + ix``; the voxels of a patch are flattened ``z, y, x``. A superpatch is the box of ``size``
voxels at ``origin`` (default: the whole volume), mirrored along the axes that ``flip`` names *after* it is cut out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Window = tuple[float, float] | Tensor
Edges = tuple[int, int, int]
Size = int | Edges


def gather_patches(
    volume_BZYX: Tensor,
    ids_BN: Tensor,
    *,
    patch_size: Size,
    window: Window,
    mean: float,
    std: float,
    dtype: torch.dtype,
    origin: Tensor | None = None,
    flip: Tensor | None = None,
    size: Size | None = None,
) -> Tensor:
    """Cut the patches ``ids_BN`` out of the volume: ``[B, N, V]`` of ``dtype``, windowed and normalised."""
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


def unshuffle_tokens_backward(
    grad_BSD: Tensor, ids_restore_BL: Tensor, ids_subset_BS: Tensor | None, visible: int
) -> tuple[Tensor, Tensor]:
    """Gradients by the visible tokens, ``[B, N, D]``, and by the mask token, ``[D]`` summed in float32 or better."""
    source_BS = ids_restore_BL if ids_subset_BS is None else ids_restore_BL.gather(1, ids_subset_BS)
    hidden = (source_BS >= visible)[..., None]
    B, _, D = grad_BSD.shape
    index = source_BS.clamp(max=visible - 1)[..., None].expand(-1, -1, D)
    grad_BND = grad_BSD.new_zeros(B, visible, D).scatter_add_(1, index, grad_BSD.masked_fill(hidden, 0))
    exact = torch.promote_types(grad_BSD.dtype, torch.float32)
    return grad_BND, grad_BSD.masked_fill(~hidden, 0).sum((0, 1), dtype=exact)


def unshuffle_positions_backward(grad_BSD: Tensor, ids_subset_BS: Tensor | None, tokens: int) -> Tensor:
    """Gradient by the position codes, ``[L, D]`` in float32 or better; training with fixed codes never asks for it."""
    grad = grad_BSD.to(torch.promote_types(grad_BSD.dtype, torch.float32))
    if ids_subset_BS is None:
        return grad.sum(0)
    return grad.new_zeros(tokens, grad.shape[-1]).index_add_(0, ids_subset_BS.flatten(), grad.flatten(0, 1))


def masked_reconstruction_loss(
    pred_BMV: Tensor,
    volume_BZYX: Tensor,
    ids_masked_BM: Tensor,
    *,
    patch_size: Size,
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
    pred, target = _pred_and_target(
        pred_BMV, volume_BZYX, ids_masked_BM, norm_patch, eps, patch_size=patch_size, window=window, mean=mean,
        std=std, origin=origin, flip=flip, size=size,
    )  # fmt: skip
    error_BM = (pred - target).square().mean(dim=-1)
    weight_BM = torch.ones_like(error_BM) if weight is None else weight.to(pred.dtype)
    return (error_BM * weight_BM).sum() / weight_BM.sum().clamp_min(torch.finfo(pred.dtype).tiny)


def masked_reconstruction_loss_backward(
    grad: Tensor,
    pred_BMV: Tensor,
    volume_BZYX: Tensor,
    ids_masked_BM: Tensor,
    *,
    patch_size: Size,
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
    """Gradient of the loss by ``pred``, in its shape and dtype; the targets are looked up again."""
    pred, target = _pred_and_target(
        pred_BMV, volume_BZYX, ids_masked_BM, norm_patch, eps, patch_size=patch_size, window=window, mean=mean,
        std=std, origin=origin, flip=flip, size=size,
    )  # fmt: skip
    weight_BM = torch.ones_like(pred[..., 0]) if weight is None else weight.to(pred.dtype)
    total = weight_BM.sum()
    share_BM = torch.where(total > 0, grad / total, 0) * weight_BM / pred.shape[-1]
    return ((pred - target).mul_(2).mul_(share_BM[..., None])).to(pred_BMV.dtype)


def _pred_and_target(
    pred_BMV: Tensor, volume: Tensor, ids_masked_BM: Tensor, norm_patch: bool, eps: float, **lookup: Any
) -> tuple[Tensor, Tensor]:
    """Return predictions and true patches alike in dtype, float32 or better."""
    pred = pred_BMV.to(torch.promote_types(pred_BMV.dtype, torch.float32))
    target = gather_patches(volume, ids_masked_BM, dtype=pred.dtype, **lookup)
    if norm_patch:
        variance, average = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - average) / (variance + eps).sqrt()
    return pred, target


def _patch_voxels(
    volume_BZYX: Tensor,
    ids_BN: Tensor,
    patch_size: Size,
    origin: Tensor | None,
    flip: Tensor | None,
    size: Size | None,
) -> Tensor:
    """Look up the raw voxels ``[B, N, V]`` of patches ``ids_BN`` of the cropped and mirrored volume."""
    volume, patch = samples_in_place(volume_BZYX), edges_of(patch_size)
    corner_BN = _patch_corners(volume, ids_BN, patch, origin, flip, superpatch_edges(volume, size))
    # A view of every box as large as a patch, by the number of its first voxel: each patch is then one strided copy.
    _, *strides = volume.stride()
    reach = sum((edge - 1) * stride for edge, stride in zip(patch, strides, strict=True))
    boxes = (len(volume) - 1) * volume.stride(0) + volume[0].numel() - reach
    every_box = volume.as_strided((boxes, *patch), (1, *strides))
    patch_BNV = every_box.index_select(0, corner_BN.flatten()).reshape(*ids_BN.shape, math.prod(patch))
    return patch_BNV if flip is None else _mirror(patch_BNV, flip, patch)


def _patch_corners(
    volume: Tensor, ids_BN: Tensor, patch: Edges, origin: Tensor | None, flip: Tensor | None, edges: Edges
) -> Tensor:
    """Number the first voxel of each patch, ``[B, N]``, counting all voxels of the batch."""
    _, gy, gx = (edge // of_patch for edge, of_patch in zip(edges, patch, strict=True))
    index_zyx = (ids_BN // (gy * gx), ids_BN // gx % gy, ids_BN % gx)
    batch_stride, *strides = volume.stride()
    corner_BN = torch.arange(len(volume), device=volume.device)[:, None] * batch_stride
    for axis, (index, edge, of_patch, stride) in enumerate(zip(index_zyx, edges, patch, strides, strict=True)):
        start = index * of_patch if flip is None else torch.where(
            flip[:, axis, None], edge - of_patch - index * of_patch, index * of_patch
        )  # fmt: skip
        corner_BN = corner_BN + stride * (start if origin is None else start + origin[:, axis, None])
    return corner_BN


def _mirror(patch_BNV: Tensor, flip: Tensor, patch: Edges) -> Tensor:
    """Mirror the voxels inside each patch along the axes its sample's ``flip`` names."""
    z, y, x = (
        torch.where(flip[:, axis, None], edge - 1 - forward, forward)
        for axis, edge in enumerate(patch)
        for forward in (torch.arange(edge, device=flip.device),)
    )
    _, PY, PX = patch
    source_BV = ((z[:, :, None, None] * PY + y[:, None, :, None]) * PX + x[:, None, None, :]).flatten(1)
    return patch_BNV.gather(2, source_BV[:, None].expand_as(patch_BNV))


def _window_bounds(window: Window, like: Tensor) -> tuple[Any, Any]:
    """Return ``(lo, hi)``: the numbers of one window, or tensors that broadcast against ``[B, N, V]``.

    Numbers stay numbers. A tensor of them would be copied to the GPU: the host waits for such a copy, and no CUDA
    graph can capture it.
    """
    if not isinstance(window, Tensor):
        return window
    lo, hi = window.to(like).unbind(-1)
    return lo.reshape(-1, 1, 1), hi.reshape(-1, 1, 1)


def samples_in_place(volume_BZYX: Tensor) -> Tensor:
    """Return the volume with each sample contiguous; a scan that all samples share (stride 0) is not copied."""
    return volume_BZYX if len(volume_BZYX) and volume_BZYX[0].is_contiguous() else volume_BZYX.contiguous()


def edges_of(size: Size) -> Edges:
    """Return the edges ``(z, y, x)`` of a box given by one edge, a cube's, or by all three."""
    if isinstance(size, int):
        return size, size, size
    z, y, x = size
    return z, y, x


def superpatch_edges(volume_BZYX: Tensor, size: Size | None) -> Edges:
    """Resolve the superpatch's edges ``(z, y, x)`` in voxels: ``size``, or the volume's own."""
    _, z, y, x = volume_BZYX.shape
    return (z, y, x) if size is None else edges_of(size)
