"""The masked reconstruction loss on a GPU: targets are looked up where they are compared, and never written.

Forward: each program sums the weighted errors of its patches, then one program sums those sums, always in the same
order. Backward: the targets are looked up again, and each gradient is written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maesil.kernels.configs import launch
from maesil.kernels.voxels import Lookup, load_voxels


@triton.jit
def _patch_statistics(
    volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y, sample, token, live, eps,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    EDGE_Z: tl.constexpr, EDGE_Y: tl.constexpr, EDGE_X: tl.constexpr, UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean, and 1 / sqrt(unbiased variance + eps), of each true patch: ``[T]`` both, in two passes."""
    VOXELS: tl.constexpr = PZ * PY * PX
    total = tl.zeros_like(token).to(tl.float32)
    for start in range(0, VOXELS, COLUMNS):
        voxel = start + tl.arange(0, COLUMNS)
        inside = live[:, None] & (voxel < VOXELS)[None, :]
        value = load_voxels(
            volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y,
            sample, token, voxel, inside, PZ, PY, PX, EDGE_Z, EDGE_Y, EDGE_X, UNIT,
        )  # fmt: skip
        total += tl.sum(tl.where(inside, value, 0.0), axis=1)
    average = total * (1.0 / VOXELS)
    squares = tl.zeros_like(total)
    for start in range(0, VOXELS, COLUMNS):
        voxel = start + tl.arange(0, COLUMNS)
        inside = live[:, None] & (voxel < VOXELS)[None, :]
        value = load_voxels(
            volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y,
            sample, token, voxel, inside, PZ, PY, PX, EDGE_Z, EDGE_Y, EDGE_X, UNIT,
        )  # fmt: skip
        deviation = tl.where(inside, value - average[:, None], 0.0)
        squares += tl.sum(deviation * deviation, axis=1)
    return average, 1.0 / tl.sqrt(squares * (1.0 / (VOXELS - 1)) + eps)


@triton.jit
def _loss_kernel(
    partials, pred, weight, ids, volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y,
    rows, tokens_per_sample, eps,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    EDGE_Z: tl.constexpr, EDGE_Y: tl.constexpr, EDGE_X: tl.constexpr, UNIT: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program writes two sums over ``ROWS`` patches: of weight times mean squared error, and of weight."""
    VOXELS: tl.constexpr = PZ * PY * PX
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    row = tl.minimum(row, rows - 1)
    sample, token = row // tokens_per_sample, tl.load(ids + row).to(tl.int32)
    if NORM:
        average, scale = _patch_statistics(
            volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y, sample, token, live, eps,
            PZ, PY, PX, EDGE_Z, EDGE_Y, EDGE_X, UNIT, COLUMNS,
        )  # fmt: skip
    error = tl.zeros_like(token).to(tl.float32)
    for start in range(0, VOXELS, COLUMNS):
        voxel = start + tl.arange(0, COLUMNS)
        inside = live[:, None] & (voxel < VOXELS)[None, :]
        target = load_voxels(
            volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y,
            sample, token, voxel, inside, PZ, PY, PX, EDGE_Z, EDGE_Y, EDGE_X, UNIT,
        )  # fmt: skip
        if NORM:
            target = (target - average[:, None]) * scale[:, None]
        offset = row.to(tl.int64)[:, None] * VOXELS + voxel[None, :]
        difference = tl.load(pred + offset, mask=inside, other=0).to(tl.float32) - target
        error += tl.sum(tl.where(inside, difference * difference, 0.0), axis=1)
    share = tl.full((ROWS,), 1.0, tl.float32) if weight is None else tl.load(weight + row)
    share = tl.where(live, share, 0.0)
    program = tl.program_id(0)
    tl.store(partials + program, tl.sum(error * share) * (1.0 / VOXELS))
    tl.store(partials + tl.num_programs(0) + program, tl.sum(share))


@triton.jit
def _finish_kernel(loss, partials, count, COLUMNS: tl.constexpr):
    """One program divides the sum of the first ``count`` partial sums by that of the next ``count``."""
    column = tl.arange(0, COLUMNS)
    error, weight = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, count, COLUMNS):
        inside = start + column < count
        error += tl.load(partials + start + column, mask=inside, other=0.0)
        weight += tl.load(partials + count + start + column, mask=inside, other=0.0)
    total = tl.sum(weight)
    tl.store(loss, tl.sum(error) / tl.where(total > 0, total, 1.0))


@triton.jit
def _loss_backward_kernel(
    grad_pred, grad, total, pred, weight, ids, volume, windows, origin, flip, lo, hi, mean, std,
    stride_b, stride_z, stride_y, rows, tokens_per_sample, eps,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    EDGE_Z: tl.constexpr, EDGE_Y: tl.constexpr, EDGE_X: tl.constexpr, UNIT: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program writes the gradients of ``ROWS`` patches: 2 (pred - target) / V, times weight over total weight."""
    VOXELS: tl.constexpr = PZ * PY * PX
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    row = tl.minimum(row, rows - 1)
    sample, token = row // tokens_per_sample, tl.load(ids + row).to(tl.int32)
    if NORM:
        average, scale = _patch_statistics(
            volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y, sample, token, live, eps,
            PZ, PY, PX, EDGE_Z, EDGE_Y, EDGE_X, UNIT, COLUMNS,
        )  # fmt: skip
    if weight is None:
        share = tl.full((ROWS,), 1.0, tl.float32) / rows
    else:
        weights = tl.load(total)
        share = tl.load(weight + row) / tl.where(weights > 0, weights, 1.0)
    share *= tl.load(grad).to(tl.float32) * (2.0 / VOXELS)
    for start in range(0, VOXELS, COLUMNS):
        voxel = start + tl.arange(0, COLUMNS)
        inside = live[:, None] & (voxel < VOXELS)[None, :]
        target = load_voxels(
            volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y,
            sample, token, voxel, inside, PZ, PY, PX, EDGE_Z, EDGE_Y, EDGE_X, UNIT,
        )  # fmt: skip
        if NORM:
            target = (target - average[:, None]) * scale[:, None]
        offset = row.to(tl.int64)[:, None] * VOXELS + voxel[None, :]
        difference = tl.load(pred + offset, mask=inside, other=0).to(tl.float32) - target
        tl.store(grad_pred + offset, (difference * share[:, None]).to(grad_pred.dtype.element_ty), mask=inside)


def masked_reconstruction_loss(
    pred_BMV: Tensor,
    volume_BZYX: Tensor,
    ids_masked_BM: Tensor,
    *,
    norm_patch: bool,
    eps: float,
    weight: Tensor | None,
    **lookup: Any,
) -> Tensor:
    """Average the squared error of the hidden patches: `maesil.kernels.reference.masked_reconstruction_loss`."""
    rows, voxels = ids_masked_BM.numel(), pred_BMV.shape[-1]
    tile, look = launch("loss_forward", voxels), Lookup.make(volume_BZYX, **lookup)
    programs = triton.cdiv(rows, tile.rows)
    partials = pred_BMV.new_empty((2, programs), dtype=torch.float32)
    loss = pred_BMV.new_empty((), dtype=torch.float32)
    if programs:
        _loss_kernel[programs,](
            partials, pred_BMV.contiguous(), _exact(weight), ids_masked_BM.contiguous(), *look.arguments,
            rows, ids_masked_BM.shape[1], eps, **look.constants,
            NORM=norm_patch, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    _finish_kernel[1,](loss, partials, programs, COLUMNS=1024, num_warps=8)
    return loss


def masked_reconstruction_loss_backward(
    grad: Tensor,
    pred_BMV: Tensor,
    volume_BZYX: Tensor,
    ids_masked_BM: Tensor,
    *,
    norm_patch: bool,
    eps: float,
    weight: Tensor | None,
    **lookup: Any,
) -> Tensor:
    """Gradient by ``pred``: `maesil.kernels.reference.masked_reconstruction_loss_backward`."""
    rows, voxels = ids_masked_BM.numel(), pred_BMV.shape[-1]
    tile, look = launch("loss_backward", voxels), Lookup.make(volume_BZYX, **lookup)
    grad_pred = torch.empty_like(pred_BMV, memory_format=torch.contiguous_format)
    weight = _exact(weight)
    total = None if weight is None else weight.sum()
    if rows:
        _loss_backward_kernel[triton.cdiv(rows, tile.rows),](
            grad_pred, grad.contiguous(), total, pred_BMV.contiguous(), weight, ids_masked_BM.contiguous(),
            *look.arguments, rows, ids_masked_BM.shape[1], eps, **look.constants,
            NORM=norm_patch, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    return grad_pred


def _exact(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float().contiguous()
