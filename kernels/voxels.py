"""What the Triton gather and loss share: looking voxels up in int16 volumes, windowed and normalised.

A tile is ``[T, V]``: T tokens of any samples, V consecutive voxels of their patches. Along x a patch lies in memory
as PX voxels in a row; all that a GPU needs to load them 16 bytes at a time is to know that rows start on such a border.
So strides come in units of ``UNIT`` voxels, the power of two up to 8 that divides the volume's edge along x and the
distance from one sample to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from maesil.kernels.reference import Size, Window, edges_of, samples_in_place, superpatch_edges


@triton.jit
def load_voxels(
    volume, windows, origin, flip,  # pointers; all but the first may be None
    lo, hi, mean, std, stride_b, stride_z, stride_y,
    sample, token, voxel, inside,  # [T], [T], [V], [T, V]
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    EDGE_Z: tl.constexpr, EDGE_Y: tl.constexpr, EDGE_X: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Load the voxels of the tile in float32: ((clip(hu, lo, hi) - lo) / (hi - lo) - mean) / std."""
    WHOLE_ROWS: tl.constexpr = (PX & (PX - 1)) == 0  # rows of a power of two of voxels can be reversed in registers
    # Where the patch lies in its superpatch, counted in patches, and where a voxel lies in its patch.
    gz: tl.constexpr = EDGE_Z // PZ
    gy: tl.constexpr = EDGE_Y // PY
    gx: tl.constexpr = EDGE_X // PX
    iz, iy, ix = token // (gy * gx), token // gx % gy, token % gx
    z, y, x = (voxel // (PY * PX))[None, :], (voxel // PX % PY)[None, :], (voxel % PX)[None, :]
    if flip is not None:
        # A mirrored superpatch holds the patch in the mirrored place, and its voxels in reverse.
        flip_z = tl.load(flip + sample * 3) != 0
        flip_y = tl.load(flip + sample * 3 + 1) != 0
        flip_x = tl.load(flip + sample * 3 + 2) != 0
        iz, iy = tl.where(flip_z, gz - 1 - iz, iz), tl.where(flip_y, gy - 1 - iy, iy)
        ix = tl.where(flip_x, gx - 1 - ix, ix)
        z, y = tl.where(flip_z[:, None], PZ - 1 - z, z), tl.where(flip_y[:, None], PY - 1 - y, y)
        if not WHOLE_ROWS:
            x = tl.where(flip_x[:, None], PX - 1 - x, x)
    z0, y0 = iz * PZ, iy * PY
    if origin is not None:
        z0 += tl.load(origin + sample * 3)
        y0 += tl.load(origin + sample * 3 + 1)

    row = sample.to(tl.int64) * stride_b + z0.to(tl.int64) * stride_z + y0.to(tl.int64) * stride_y
    offset = (row * UNIT + ix * PX)[:, None] + (z.to(tl.int64) * stride_z + y.to(tl.int64) * stride_y) * UNIT + x
    if origin is None:
        hu = tl.load(volume + offset, mask=inside, other=0)
    else:
        # Two loads of which one takes place, so that origins on whole units keep the wide one.
        x0 = tl.load(origin + sample * 3 + 2)
        whole = (x0 % UNIT == 0)[:, None]
        wide = tl.load(volume + offset + (x0 // UNIT * UNIT)[:, None], mask=inside & whole, other=0)
        narrow = tl.load(volume + offset + x0[:, None], mask=inside & ~whole, other=0)
        hu = tl.where(whole, wide, narrow)
    if flip is not None and WHOLE_ROWS:
        rows = tl.reshape(hu, (hu.shape[0] * hu.shape[1] // PX, PX))
        hu = tl.where(flip_x[:, None], tl.reshape(tl.flip(rows, 1), hu.shape), hu)

    if windows is not None:
        lo = tl.load(windows + sample * 2).to(tl.float32)[:, None]
        hi = tl.load(windows + sample * 2 + 1).to(tl.float32)[:, None]
    value = tl.minimum(tl.maximum(hu.to(tl.float32), lo), hi) - lo
    return (value * (1.0 / (hi - lo)) - mean) * (1.0 / std)


@dataclass(frozen=True)
class Lookup:
    """The arguments of ``load_voxels`` for a call."""

    arguments: tuple[Any, ...]
    """volume, windows, origin, flip, lo, hi, mean, std, stride_b, stride_z, stride_y"""
    constants: dict[str, int]
    """PZ, PY, PX, EDGE_Z, EDGE_Y, EDGE_X, UNIT"""

    @classmethod
    def make(
        cls,
        volume: Tensor,
        *,
        patch_size: Size,
        window: Window,
        mean: float,
        std: float,
        origin: Tensor | None,
        flip: Tensor | None,
        size: Size | None,
    ) -> Lookup:
        """Bring what `maesil.kernels.gather_patches` takes into the form a kernel takes."""
        if isinstance(window, Tensor):
            windows, lo, hi = window.expand(len(volume), 2).contiguous(), 0.0, 1.0
        else:
            windows, (lo, hi) = None, window
        volume = samples_in_place(volume)
        apart = volume.stride(0) if len(volume) > 1 else 0
        unit = math.gcd(volume.shape[3], apart, 8)
        strides = (stride // unit for stride in volume.stride()[:3])
        placed = (None if value is None else value.contiguous() for value in (origin, flip))
        (z, y, x), (PZ, PY, PX) = superpatch_edges(volume, size), edges_of(patch_size)
        return cls(
            (volume, windows, *placed, lo, hi, mean, std, *strides),
            {"PZ": PZ, "PY": PY, "PX": PX, "EDGE_Z": z, "EDGE_Y": y, "EDGE_X": x, "UNIT": unit},
        )
