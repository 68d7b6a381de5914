"""Gather visible patches on a GPU: every voxel is read once as int16 and written once as the model wants it."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maesil.kernels.configs import launch
from maesil.kernels.reference import edges_of
from maesil.kernels.voxels import Lookup, load_voxels


@triton.jit
def _gather_kernel(
    patches, ids, volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y,
    rows, tokens_per_sample,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    EDGE_Z: tl.constexpr, EDGE_Y: tl.constexpr, EDGE_X: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program writes ``COLUMNS`` voxels of ``ROWS`` patches."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    voxel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (voxel < PZ * PY * PX)[None, :]
    row = tl.minimum(row, rows - 1)
    token = tl.load(ids + row).to(tl.int32)
    value = load_voxels(
        volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y,
        row // tokens_per_sample, token, voxel, inside, PZ, PY, PX, EDGE_Z, EDGE_Y, EDGE_X, UNIT,
    )  # fmt: skip
    offset = row.to(tl.int64)[:, None] * (PZ * PY * PX) + voxel[None, :]
    tl.store(patches + offset, value.to(patches.dtype.element_ty), mask=inside)


def gather_patches(volume_BZYX: Tensor, ids_BN: Tensor, *, dtype: torch.dtype, **lookup: Any) -> Tensor:
    """Cut the patches ``ids_BN`` out: `maesil.kernels.reference.gather_patches`."""
    voxels = math.prod(edges_of(lookup["patch_size"]))
    patches = volume_BZYX.new_empty((*ids_BN.shape, voxels), dtype=dtype)
    rows, tile, look = ids_BN.numel(), launch("gather", voxels), Lookup.make(volume_BZYX, **lookup)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(voxels, tile.columns))
    if rows:
        _gather_kernel[grid](
            patches, ids_BN.contiguous(), *look.arguments, rows, ids_BN.shape[1], **look.constants,
            ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    return patches
