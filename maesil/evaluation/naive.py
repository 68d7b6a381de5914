"""The naive baselines: two predictions that cost no training. A model that does not beat them has learned nothing.

`MeanBaseline` predicts the mean of what is visible, `InterpolationBaseline` bends the smoothest field through it.
Both see what a model sees, and the valid voxels alone: the -1024 beyond a volume never enters.

Shapes: B samples, Z Y X voxels, L tokens; HU as float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from maesil.models.masking import Masks
from maesil.models.patches import expand_cells
from maesil.types import AIR_HU, Edges, Window, zyx

TENSION = 0.03
"""Weight of the squared gradient against the squared Laplacian (1 / voxel^2); see ``docs/explanation/metrics.md``."""

ITERATIONS = 30
"""Conjugate-gradient steps. More of them move the score of a single real crop by up to 0.15 dB, that of several crops
together by less than 0.05 dB, at patches of 8 (`tests/evaluation/test_naive.py`)."""


class MeanBaseline:
    """Predicts one number per crop: the mean of its visible valid voxels."""

    name = "mean"

    def __init__(self, window: Window, patch: Edges) -> None:
        self.window, self.patch = window, patch

    def predict_hu(self, volume_BZYX: Tensor, masks: Masks, valid_BZYX: Tensor | None = None) -> Tensor:
        """Predict every voxel, float32 HU ``[B, Z, Y, X]``.

        ``valid_BZYX`` bool says which voxels lie inside the scan (default: all). A crop without a visible
        valid voxel gets air (-1024 HU clipped to the window).
        """
        values, known = _visible(volume_BZYX, masks, valid_BZYX, self.window, self.patch)
        return _mean_of_known(values, known).clamp(*self.window).expand_as(values).clone()


class InterpolationBaseline:
    """Interpolates the visible valid voxels by a spline in tension, see `spline_in_tension`."""

    name = "interpolation"

    def __init__(self, window: Window, patch: Edges) -> None:
        self.window, self.patch = window, patch

    def predict_hu(self, volume_BZYX: Tensor, masks: Masks, valid_BZYX: Tensor | None = None) -> Tensor:
        """Predict every voxel, float32 HU ``[B, Z, Y, X]``.

        ``valid_BZYX`` bool says which voxels lie inside the scan (default: all). Visible valid voxels are
        returned as they are (clipped to the window). A crop without any gets air.
        """
        values, known = _visible(volume_BZYX, masks, valid_BZYX, self.window, self.patch)
        # One crop at a time on a CPU: its dozen fields then stay in the cache.
        at_once = len(values) if values.is_cuda else 1
        parts = [slice(start, start + at_once) for start in range(0, len(values), at_once)]
        filled = [spline_in_tension(values[part], known[part], coarsest=max(zyx(self.patch))) for part in parts]
        return torch.cat(filled).clamp(*self.window)


def spline_in_tension(
    values_BZYX: Tensor,
    known_BZYX: Tensor,
    *,
    coarsest: int = 8,
    tension: float = TENSION,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Fill the unknown voxels with the field of least curvature and tension.

    That is the field u of least ``sum |laplacian u|^2 + tension * |gradient u|^2``, a continuous-curvature
    spline in tension (Smith and Wessel, Geophysics 55:293, 1990) on the 7-point Laplacian with mirrored box
    faces: unlike a harmonic field, it continues the slope of the visible voxels into the gaps. It starts from
    the mean of the known voxels and is solved by conjugate gradients for the unknown ones, preconditioned on
    several scales (Bramble, Pasciak and Xu, Math. Comp. 55:1, 1990), so that a few dozen iterations do at any
    size. ``coarsest`` is the edge of the coarsest scale's cells in voxels, about the size of the gaps.
    Float32 or float64 ``[B, Z, Y, X]`` and bool of the same shape; every sample is solved by itself.
    """
    unknown = (~known_BZYX).to(values_BZYX.dtype)
    start = torch.where(known_BZYX, values_BZYX, _mean_of_known(values_BZYX, known_BZYX)).contiguous()
    energy = _Energy(unknown, tension)
    precondition = _Preconditioner(unknown, energy.degree, coarsest, tension)
    # Every field is written in place: fresh memory for each of them took half of the time.
    correction, along, scaled = (torch.zeros_like(start) for _ in range(3))
    residual = energy.gradient(start, torch.empty_like(start)).neg_()
    search = precondition(residual, torch.empty_like(start))
    product, tiny = _dot(residual, search, along), torch.finfo(start.dtype).tiny
    for _ in range(iterations):
        energy.gradient(search, along)
        step = product / _dot(search, along, scaled).clamp_min(tiny)
        correction.addcmul_(step, search)
        residual.addcmul_(step, along, value=-1)
        precondition(residual, scaled)
        before, product = product, _dot(residual, scaled, along)
        torch.addcmul(scaled, product / before.clamp_min(tiny), search, out=search)
    return correction.add_(start)


class _Energy:
    """The energy that a spline makes least, on boxes of one shape."""

    def __init__(self, unknown_BZYX: Tensor, tension: float) -> None:
        self._unknown, self._bend = unknown_BZYX, torch.empty_like(unknown_BZYX)
        one = unknown_BZYX[:1]
        self.degree = _sum_neighbours(torch.ones_like(one), torch.empty_like(one))
        """How many of the six face neighbours a voxel has."""
        self._own = tension + self.degree

    def gradient(self, field_BZYX: Tensor, out_BZYX: Tensor) -> Tensor:
        """Write half the gradient of the energy with respect to the unknown voxels."""
        # With the Laplacian D (neighbours less degree times voxel) it is D D - tension D.
        bend = _sum_neighbours(field_BZYX, self._bend).addcmul_(self.degree, field_BZYX, value=-1)
        return _sum_neighbours(bend, out_BZYX).addcmul_(self._own, bend, value=-1).mul_(self._unknown)


class _Preconditioner:
    """Approximate inverse of the energy's matrix: its diagonals on every scale, added up."""

    def __init__(self, unknown_BZYX: Tensor, degree: Tensor, coarsest: int, tension: float) -> None:
        # The diagonal of tension * L + L^2 is tension * degree + degree^2 + degree (its neighbours' ones).
        self._scales = [unknown_BZYX / (tension * degree + degree.square() + degree)]
        free, edge = unknown_BZYX, 1
        while edge < coarsest and all(size % 2 == 0 for size in free.shape[1:]):
            edge *= 2
            # A coarse cell helps only where it touches nothing known.
            free = -functional.max_pool3d(-free, 2)
            # On cells of edge h the stencils shrink to 6/h^2 and 42/h^4, and a cell stands for h^3 voxels.
            self._scales.append(free / ((6 * tension / edge**2 + 42 / edge**4) * edge**3))
        self._unknown, self._weights = unknown_BZYX, _Weights(unknown_BZYX)

    def __call__(self, residual_BZYX: Tensor, out_BZYX: Tensor) -> Tensor:
        """Write the inverse applied to a residual."""
        coarse = [residual_BZYX]
        for _ in self._scales[1:]:
            coarse.append(_restrict(coarse[-1], self._weights))
        if len(coarse) == 1:
            return torch.mul(self._scales[0], residual_BZYX, out=out_BZYX)
        total = self._scales[-1] * coarse[-1]
        for scale, part in zip(self._scales[-2:0:-1], coarse[-2:0:-1], strict=True):
            total = _prolong(total, self._weights).addcmul_(scale, part)
        return _prolong(total, self._weights, out_BZYX).mul_(self._unknown).addcmul_(self._scales[0], residual_BZYX)


def _visible(
    volume_BZYX: Tensor, masks: Masks, valid_BZYX: Tensor | None, window: Window, patch: Edges
) -> tuple[Tensor, Tensor]:
    """Return the volume as windowed float32 HU and which of its voxels a predictor may know (bool)."""
    grid = (n // edge for n, edge in zip(volume_BZYX.shape[1:], zyx(patch), strict=True))
    visible = (masks.mask == 0).view(len(volume_BZYX), *grid)
    known = expand_cells(visible, patch)
    return volume_BZYX.float().clamp(*window), known if valid_BZYX is None else known & valid_BZYX


def _mean_of_known(values_BZYX: Tensor, known_BZYX: Tensor) -> Tensor:
    """Return the mean over the known voxels of each sample, ``[B, 1, 1, 1]``; -1024 where there is none."""
    count = known_BZYX.sum(dim=(1, 2, 3), keepdim=True)
    total = (values_BZYX * known_BZYX).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    mean = torch.where(count > 0, total / count.clamp_min(1), float(AIR_HU))
    return mean.to(values_BZYX.dtype)


def _sum_neighbours(field_BZYX: Tensor, out_BZYX: Tensor) -> Tensor:
    """Write the sum of the up to six face neighbours of every voxel; both fields are contiguous."""
    flat, flat_out = field_BZYX.view(-1), out_BZYX.view(-1)
    # Along x all rows as one, and their ends anew: long rows are added up faster than many short ones.
    torch.add(flat[2:], flat[:-2], out=flat_out[1:-1])
    out_BZYX[..., 0], out_BZYX[..., -1] = field_BZYX[..., 1], field_BZYX[..., -2]
    for axis in (1, 2):
        last = field_BZYX.shape[axis] - 1
        out_BZYX.narrow(axis, 0, last).add_(field_BZYX.narrow(axis, 1, last))
        out_BZYX.narrow(axis, 1, last).add_(field_BZYX.narrow(axis, 0, last))
    return out_BZYX


_SMALL = 32
"""Boxes of up to this edge (voxels) are halved and doubled by products of matrices, which are few calls."""


def _prolong(cells_BZYX: Tensor, weights: _Weights, out_BZYX: Tensor | None = None) -> Tensor:
    """Interpolate to twice the resolution, linear between cell centres, constant beyond the outermost."""
    # x first, so that the interleaved writes are done while the field is small.
    for axis in (3, 2, 1):
        size, last = cells_BZYX.shape[axis], axis == 1
        if axis == 3 or 2 * size <= _SMALL:
            cells_BZYX = _product(weights[2 * size], cells_BZYX, axis)
        else:
            cells_BZYX = _doubled(cells_BZYX, axis, out_BZYX if last else None)
    if out_BZYX is None or out_BZYX is cells_BZYX:
        return cells_BZYX
    return out_BZYX.copy_(cells_BZYX)


def _restrict(field_BZYX: Tensor, weights: _Weights) -> Tensor:
    """Sum onto cells of twice the edge: the transpose of `_prolong`, as conjugate gradients need it."""
    for axis in (1, 2, 3):
        size = field_BZYX.shape[axis]
        if axis == 3 or size <= _SMALL:
            field_BZYX = _product(weights[size].T, field_BZYX, axis)
        else:
            field_BZYX = _halved(field_BZYX, axis)
    return field_BZYX


def _product(weights: Tensor, field_BZYX: Tensor, axis: int) -> Tensor:
    """Multiply a matrix with a field along one axis."""
    if axis == 1:
        return (weights @ field_BZYX.flatten(2)).view(len(field_BZYX), -1, *field_BZYX.shape[2:])
    return weights @ field_BZYX if axis == 2 else field_BZYX @ weights.T


def _doubled(cells_BZYX: Tensor, axis: int, out_BZYX: Tensor | None) -> Tensor:
    """Interpolate along z or y."""
    shape = cells_BZYX.shape
    halves = [*shape[: axis + 1], 2, *shape[axis + 1 :]]
    pairs = cells_BZYX.new_empty(halves) if out_BZYX is None else out_BZYX.view(halves)
    before, after = pairs.unbind(axis + 1)
    torch.mul(cells_BZYX, 0.75, out=before)
    after.copy_(before)
    _add_beside(before, cells_BZYX, cells_BZYX, axis, -1)
    _add_beside(after, cells_BZYX, cells_BZYX, axis, 1)
    return pairs.flatten(axis, axis + 1) if out_BZYX is None else out_BZYX


def _halved(field_BZYX: Tensor, axis: int) -> Tensor:
    """Sum along z or y."""
    shape = field_BZYX.shape
    before, after = field_BZYX.view(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :]).unbind(axis + 1)
    cells = (before + after).mul_(0.75)
    _add_beside(cells, after, before, axis, -1)
    _add_beside(cells, before, after, axis, 1)
    return cells


class _Weights(dict[int, Tensor]):
    """For rows of each length, how much each voxel takes of each cell of two: ``[size, size / 2]``.

    They are made where and when they are needed, on the device and stream of the field that they are for.
    """

    def __init__(self, field: Tensor) -> None:
        super().__init__()
        self._field = field

    def __missing__(self, size: int) -> Tensor:
        voxel = torch.arange(size, device=self._field.device)
        cell, cells = voxel // 2, torch.arange(size // 2, device=self._field.device)
        beside = (cell + 2 * (voxel % 2) - 1).clamp(0, size // 2 - 1)
        own, other = ((one[:, None] == cells).to(self._field.dtype) for one in (cell, beside))
        self[size] = own.mul_(0.75).add_(other, alpha=0.25)
        return self[size]


def _add_beside(total_BZYX: Tensor, field_BZYX: Tensor, outermost_BZYX: Tensor, axis: int, side: int) -> None:
    """Add a quarter of what lies beside each entry, at one side; where nothing does, of the outermost itself."""
    last = field_BZYX.shape[axis] - 1
    to, start, end = (1, 0, 0) if side < 0 else (0, 1, last)
    total_BZYX.narrow(axis, to, last).add_(field_BZYX.narrow(axis, start, last), alpha=0.25)
    total_BZYX.narrow(axis, end, 1).add_(outermost_BZYX.narrow(axis, end, 1), alpha=0.25)


def _dot(left_BZYX: Tensor, right_BZYX: Tensor, scratch_BZYX: Tensor) -> Tensor:
    """Multiply and add up each sample by itself: ``[B, 1, 1, 1]``."""
    # A product of vectors would not need the scratch, but loses digits in float32.
    return torch.mul(left_BZYX, right_BZYX, out=scratch_BZYX).sum(dim=(1, 2, 3), keepdim=True)
