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
    start = torch.where(known_BZYX, values_BZYX, _mean_of_known(values_BZYX, known_BZYX))
    degree = _neighbour_sum(torch.ones_like(values_BZYX[:1]))

    def energy_gradient(field: Tensor) -> Tensor:
        bend = (degree * field).sub_(_neighbour_sum(field))
        return ((tension + degree) * bend).sub_(_neighbour_sum(bend)).mul_(unknown)

    precondition = _Preconditioner(unknown, degree, coarsest, tension)
    residual = -energy_gradient(start)
    search = precondition(residual)
    correction, product = torch.zeros_like(start), _dot(residual, search)
    tiny = torch.finfo(start.dtype).tiny
    for _ in range(iterations):
        along = energy_gradient(search)
        step = product / _dot(search, along).clamp_min(tiny)
        correction.addcmul_(step, search)
        residual.addcmul_(step, along, value=-1)
        scaled = precondition(residual)
        before, product = product, _dot(residual, scaled)
        search.mul_(product / before.clamp_min(tiny)).add_(scaled)
    return start + correction


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
        self._unknown = unknown_BZYX

    def __call__(self, residual: Tensor) -> Tensor:
        coarse = [residual]
        for _ in self._scales[1:]:
            coarse.append(_restrict(coarse[-1]))
        total = self._scales[-1] * coarse[-1]
        for scale, part in zip(self._scales[-2::-1], coarse[-2::-1], strict=True):
            total = scale * part + _prolong(total)
        return self._unknown * total


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


def _neighbour_sum(field_BZYX: Tensor) -> Tensor:
    """Add up the up to six face neighbours of every voxel."""
    total = torch.zeros_like(field_BZYX)
    for axis in (1, 2, 3):
        last = field_BZYX.shape[axis] - 1
        total.narrow(axis, 0, last).add_(field_BZYX.narrow(axis, 1, last))
        total.narrow(axis, 1, last).add_(field_BZYX.narrow(axis, 0, last))
    return total


def _prolong(cells_BZYX: Tensor) -> Tensor:
    """Interpolate to twice the resolution, linear between cell centres, constant beyond the outermost."""
    # x first, so that the interleaved writes are done while the field is small.
    for axis in (3, 2, 1):
        size = cells_BZYX.shape[axis]
        padded = _repeat_ends(cells_BZYX, axis)
        near = 0.75 * cells_BZYX
        halves = (near + 0.25 * padded.narrow(axis, 0, size), near + 0.25 * padded.narrow(axis, 2, size))
        cells_BZYX = torch.stack(halves, dim=axis + 1).flatten(axis, axis + 1)
    return cells_BZYX


def _restrict(field_BZYX: Tensor) -> Tensor:
    """Sum onto cells of twice the edge: the transpose of `_prolong`, as conjugate gradients need it."""
    for axis in (1, 2, 3):
        size = field_BZYX.shape[axis]
        padded = _repeat_ends(field_BZYX, axis).transpose(axis, 1)
        outer, inner = (
            padded[:, 0:size:2] + padded[:, 3::2],
            padded[:, 1:size:2] + padded[:, 2 : size + 1 : 2],
        )
        field_BZYX = (0.25 * outer + 0.75 * inner).transpose(axis, 1)
    return field_BZYX


def _repeat_ends(field_BZYX: Tensor, axis: int) -> Tensor:
    """Lengthen an axis by one copy of its first and of its last entry."""
    last = field_BZYX.shape[axis] - 1
    return torch.cat((field_BZYX.narrow(axis, 0, 1), field_BZYX, field_BZYX.narrow(axis, last, 1)), dim=axis)


def _dot(left_BZYX: Tensor, right_BZYX: Tensor) -> Tensor:
    """Multiply and add up each sample by itself: ``[B, 1, 1, 1]``."""
    return (left_BZYX * right_BZYX).sum(dim=(1, 2, 3), keepdim=True)
