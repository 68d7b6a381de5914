"""The scores: what each one is, in one place. ``docs/explanation/metrics.md`` tells the protocol.

Every score compares one predicted volume with its reference, both in HU and both clipped to the window, whose
width is the data range. Sums are kept in float64. Shapes: Z Y X voxels of one volume (``reference_ZYX`` and
``predicted_ZYX`` HU of any real dtype, the masks bool).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from maesil.models.patches import expand_cells
from maesil.types import MAP_CELL, Edges, Window, Zyx, zyx

BODY_SHARE = 128
"""A cell of the ``body`` map counts as body from this share on (of 255): half of it."""

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
SSIM_K1, SSIM_K2 = 0.01, 0.03
"""Gaussian window of 11 voxels and the stabilising constants of Wang et al., IEEE TIP 13:600, 2004."""

_SLAB = 16


Region = Literal["body", "whole"]
REGIONS: tuple[Region, ...] = get_args(Region)


def region_voxels(valid_cells: Tensor, body_cells: Tensor, shape: Zyx) -> dict[Region, Tensor]:
    """Return the scored regions of a volume as bool ``[Z, Y, X]``, from its uint8 maps of 8^3 cells.

    ``whole``: the voxels of cells that lie wholly inside the scan (share 255). ``body``: those of them whose
    cell is at least half body (share >= 128).
    """
    valid = valid_cells == 255
    body = valid & (body_cells >= BODY_SHARE)
    z, y, x = shape
    cells: dict[Region, Tensor] = {"body": body, "whole": valid}
    return {region: expand_cells(of_region, MAP_CELL)[:z, :y, :x] for region, of_region in cells.items()}


@dataclass
class ErrorSums:
    """Pooled errors of one volume in one region: add parts of the volume, then read the scores.

    A score over no voxel is NaN; a PSNR without any error is infinite.
    """

    window: Window
    voxels: int = 0
    hidden_voxels: int = 0
    squared: float = 0.0
    """Sum of squared errors (HU^2) over the region."""
    hidden_squared: float = 0.0
    """The same over its hidden voxels."""
    hidden_absolute: float = 0.0
    """Sum of absolute errors (HU) over its hidden voxels."""

    def add(self, reference_ZYX: Tensor, predicted_ZYX: Tensor, hidden_ZYX: Tensor, region_ZYX: Tensor) -> None:
        """Add the errors at the voxels of ``region_ZYX``; ``hidden_ZYX`` is True where the model saw nothing."""
        error = clip(predicted_ZYX[region_ZYX], self.window) - clip(reference_ZYX[region_ZYX], self.window)
        hidden_error = error[hidden_ZYX[region_ZYX]]
        self.voxels += error.numel()
        self.hidden_voxels += hidden_error.numel()
        self.squared += float(error.square().sum(dtype=torch.float64))
        self.hidden_squared += float(hidden_error.square().sum(dtype=torch.float64))
        self.hidden_absolute += float(hidden_error.abs().sum(dtype=torch.float64))

    @property
    def psnr_hidden(self) -> float:
        """PSNR (dB) over the hidden voxels."""
        return psnr(self.hidden_squared, self.hidden_voxels, self.window)

    @property
    def psnr_whole(self) -> float:
        """PSNR (dB) over all voxels, as the model put them out, visible ones included."""
        return psnr(self.squared, self.voxels, self.window)

    @property
    def psnr_pasted(self) -> float:
        """PSNR (dB) over all voxels once the visible ones are replaced by the truth: they add no error."""
        return psnr(self.hidden_squared, self.voxels, self.window)

    @property
    def mae_hu(self) -> float:
        """Mean absolute error (HU) over the hidden voxels."""
        return self.hidden_absolute / self.hidden_voxels if self.hidden_voxels else math.nan


def clip(hu: Tensor, window: Window) -> Tensor:
    """Return HU as floats clipped to the window."""
    return (hu if hu.is_floating_point() else hu.float()).clamp(*window)


def psnr(squared_error: float, voxels: int, window: Window) -> float:
    """Peak signal-to-noise ratio (dB) of a pooled squared error (HU^2): ``10 log10(width^2 / mean)``."""
    if voxels == 0:
        return math.nan
    if squared_error == 0:
        return math.inf
    return 10 * math.log10((window[1] - window[0]) ** 2 * voxels / squared_error)


def patch_rmse(
    reference_ZYX: Tensor,
    predicted_ZYX: Tensor,
    hidden_ZYX: Tensor,
    region_ZYX: Tensor,
    window: Window,
    patch: Edges,
) -> Tensor:
    """Return the root mean squared error (HU, float64 ``[n]``) of each hidden patch in the region.

    Patches of which at least half the voxels count; they lie on the grid of ``patch`` voxels from voxel 0;
    how they spread tells what the pooled score averages away.
    """
    counted = hidden_ZYX & region_ZYX
    error = (clip(predicted_ZYX, window) - clip(reference_ZYX, window)) * counted
    squares, counts = _patch_sums(error.square(), patch), _patch_sums(counted, patch)
    chosen = counts >= math.prod(zyx(patch)) / 2
    return (squares[chosen] / counts[chosen]).sqrt()


def ssim(
    reference_ZYX: Tensor,
    predicted_ZYX: Tensor,
    window: Window,
    regions: Mapping[Region, Tensor],
    *,
    valid_ZYX: Tensor | None = None,
    axial: bool = False,
) -> dict[Region, float]:
    """Return the structural similarity of each region: the mean of `ssim_map` over its voxels (NaN over nothing)."""
    totals, counts = (
        dict.fromkeys(regions, 0.0),
        {name: int(region.sum()) for name, region in regions.items()},
    )
    depth = reference_ZYX.shape[0]
    for start in range(0, depth, _SLAB):
        slab = slice(start, min(start + _SLAB, depth))
        similarity = _ssim_slab(reference_ZYX, predicted_ZYX, window, valid_ZYX, axial, slab)
        for name, region in regions.items():
            totals[name] += float(similarity[region[slab]].sum(dtype=torch.float64))
    return {name: totals[name] / counts[name] if counts[name] else math.nan for name in regions}


def ssim_map(
    reference_ZYX: Tensor,
    predicted_ZYX: Tensor,
    window: Window,
    *,
    valid_ZYX: Tensor | None = None,
    axial: bool = False,
) -> Tensor:
    """Return the structural similarity at every voxel, ``[Z, Y, X]``.

    In 3D (a window of 11^3 voxels), or slice by slice (11^2) if ``axial``. Wang et al., IEEE TIP 13:600,
    2004: Gaussian weights of sigma 1.5 voxels cut off at 5, K1 = 0.01, K2 = 0.03, and (co)variances without
    Bessel's correction; intensities are HU above the window's lower end, its width is the data range, faces
    are mirrored. So computes scikit-image's ``structural_similarity`` with ``gaussian_weights=True,
    use_sample_covariance=False, full=True``. Voxels outside ``valid_ZYX`` take no part in any local statistic
    (ours); the map means nothing there. Float64 input is computed in float64, all else in float32.
    """
    depth = reference_ZYX.shape[0]
    slabs = [slice(start, min(start + _SLAB, depth)) for start in range(0, depth, _SLAB)]
    return torch.cat([_ssim_slab(reference_ZYX, predicted_ZYX, window, valid_ZYX, axial, slab) for slab in slabs])


@dataclass
class BorderSums:
    """Gradients across patch borders and inside patches, of one volume in one region: see `ratio`."""

    patch: Edges
    crop: Edges
    window: Window
    _sums: Tensor = field(default_factory=lambda: torch.zeros(3, 2, dtype=torch.float64))
    """Absolute steps (HU) inside patches, across borders, across seams; of prediction and reference."""

    def add(self, reference_ZYX: Tensor, predicted_ZYX: Tensor, counted_ZYX: Tensor) -> None:
        """Add all pairs of face neighbours that are both in ``counted_ZYX`` (hidden and in the region).

        Patches of ``patch`` voxels and crops of ``crop`` voxels count from voxel 0 of the arrays.
        """
        volumes = (clip(predicted_ZYX, self.window), clip(reference_ZYX, self.window))
        for axis in range(3):
            size = counted_ZYX.shape[axis]
            pairs = counted_ZYX.narrow(axis, 0, size - 1) & counted_ZYX.narrow(axis, 1, size - 1)
            after = torch.arange(1, size, device=pairs.device)
            border, seam = after % zyx(self.patch)[axis] == 0, after % zyx(self.crop)[axis] == 0
            for which, volume in enumerate(volumes):
                steps = volume.diff(dim=axis).abs() * pairs
                for place, chosen in enumerate((~border, border & ~seam, seam)):
                    total = steps.index_select(axis, chosen.nonzero().flatten()).sum(dtype=torch.float64)
                    self._sums[place, which] += total.cpu()

    @property
    def ratio(self) -> float:
        """Mean absolute gradient across patch borders over that inside patches, over the same of the reference.

        1: no more of a grid than the anatomy has; above 1: the patches show. NaN where there is no gradient
        inside.
        """
        return self._against_inside(1)

    @property
    def seam_ratio(self) -> float:
        """The same across the seams between crops, which are predicted apart from each other."""
        return self._against_inside(2)

    def _against_inside(self, place: int) -> float:
        predicted_inside, reference_inside = self._sums[0].tolist()
        predicted, reference = self._sums[place].tolist()
        if not (predicted_inside > 0 and reference_inside > 0 and reference > 0):
            return math.nan
        # The numbers of pairs are the same for both volumes and cancel.
        return float(predicted / predicted_inside / (reference / reference_inside))


def _patch_sums(voxels_ZYX: Tensor, patch: Edges) -> Tensor:
    """Add up each patch, float64 ``[z, y, x]``; what a last patch lacks counts as 0."""
    sums = voxels_ZYX.double()
    for axis, edge in enumerate(zyx(patch)):
        missing = -sums.shape[axis] % edge
        if missing:
            zeros = sums.new_zeros([missing if i == axis else n for i, n in enumerate(sums.shape)])
            sums = torch.cat([sums, zeros], dim=axis)
        blocks = (*sums.shape[:axis], sums.shape[axis] // edge, edge, *sums.shape[axis + 1 :])
        sums = sums.reshape(blocks).sum(dim=axis + 1)
    return sums


def _ssim_slab(
    reference_ZYX: Tensor,
    predicted_ZYX: Tensor,
    window: Window,
    valid_ZYX: Tensor | None,
    axial: bool,
    slab: slice,
) -> Tensor:
    """Return the slices ``slab`` of the map: large volumes never exist as six filtered copies."""
    halo = 0 if axial else SSIM_RADIUS
    depth = reference_ZYX.shape[0]
    z = _mirrored(slab.start - halo, slab.stop + halo, depth).to(reference_ZYX.device)
    dtype = torch.float64 if torch.float64 in (reference_ZYX.dtype, predicted_ZYX.dtype) else torch.float32
    lo, hi = window
    # Values in 0..1, data range 1: float32 then keeps the variances apart from the constants.
    x, y = ((volume[z].to(dtype).clamp(lo, hi) - lo) / (hi - lo) for volume in (reference_ZYX, predicted_ZYX))
    weight = torch.ones_like(x) if valid_ZYX is None else valid_ZYX[z].to(dtype)
    x, y = x * weight, y * weight
    local = _gaussian(torch.stack([weight, x, y, x * x, y * y, x * y]), in_depth=not axial)
    total = local[0].clamp_min(torch.finfo(dtype).tiny)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (local[1:] / total).unbind()
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    covariance, variances = mean_xy - mean_x * mean_y, mean_xx + mean_yy - mean_x**2 - mean_y**2
    similarity: Tensor = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return similarity.div_((mean_x**2 + mean_y**2 + c1) * (variances + c2))


def _gaussian(maps_MZYX: Tensor, *, in_depth: bool) -> Tensor:
    """Filter along y and x with mirrored faces; if asked, along z too, without: the result has 2 x 5 slices less."""
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights = (taps / taps.sum()).tolist()
    for axis in (1, 2, 3) if in_depth else (2, 3):
        if axis > 1:
            size = maps_MZYX.shape[axis]
            mirrored = _mirrored(-SSIM_RADIUS, size + SSIM_RADIUS, size).to(maps_MZYX.device)
            maps_MZYX = maps_MZYX.index_select(axis, mirrored)
        length = maps_MZYX.shape[axis] - 2 * SSIM_RADIUS
        filtered = maps_MZYX.narrow(axis, 0, length) * weights[0]
        for shift, weight in enumerate(weights[1:], start=1):
            filtered.add_(maps_MZYX.narrow(axis, shift, length), alpha=weight)
        maps_MZYX = filtered
    return maps_MZYX


def _mirrored(start: int, stop: int, size: int) -> Tensor:
    """Return the indices start .. stop - 1 folded back into 0 .. size - 1: d c b a | a b c d | d c b a."""
    index = torch.arange(start, stop) % (2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)
