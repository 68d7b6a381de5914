"""Structural similarity, in 3D and slice by slice, of several predictions of one volume at a time.

What the reference alone says is computed once for all of them, and both kinds share the filter in the plane. Shapes:
Z Y X voxels of one volume; M maps, n slices of a slab, P numbers of a flat padded slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maesil.evaluation.metrics import Region, codes_of, with_bit
from maesil.types import Window

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
SSIM_K1, SSIM_K2 = 0.01, 0.03
"""Gaussian window of 11 voxels and the stabilising constants of Wang et al., IEEE TIP 13:600, 2004."""

_C1, _C2 = SSIM_K1**2, SSIM_K2**2

SsimKind = Literal["ssim_3d", "ssim_axial"]
KINDS: tuple[SsimKind, ...] = ("ssim_3d", "ssim_axial")

Similarities = dict[SsimKind, dict[Region, float]]

_SLAB = 64
_AT_ONCE = 2**18
"""How many numbers are filtered at once on a CPU: they stay in its cache."""


def ssim(
    reference_ZYX: Tensor,
    predictions: Sequence[Tensor],
    window: Window,
    regions: Mapping[Region, Tensor],
    *,
    valid_ZYX: Tensor | None = None,
    hidden_ZYX: Tensor | None = None,
    report: Callable[[int], None] | None = None,
) -> list[Similarities]:
    """Return, for each prediction, the mean of both maps (`ssim_maps`) over each region; NaN over nothing.

    Only voxels of ``hidden_ZYX`` are taken from a prediction, the others from the reference; default: all. ``report``
    is told how many slices were just done.
    """
    names = list(regions)
    codes_ZYX = codes_of([regions[name] for name in names])
    totals = torch.zeros(len(predictions), len(KINDS), 2 ** len(names), dtype=torch.float64)
    for slab, maps in _slabs(reference_ZYX, predictions, window, valid_ZYX, hidden_ZYX):
        codes = codes_ZYX[slab].flatten()
        for number, kind, similarity in maps:
            found = torch.bincount(codes, weights=similarity.flatten().double(), minlength=totals.shape[-1])
            totals[number, KINDS.index(kind)] += found.cpu()
        if report:
            report(slab.stop - slab.start)
    counts = torch.bincount(codes_ZYX.flatten(), minlength=totals.shape[-1]).cpu()

    def means(of_codes: Tensor) -> dict[Region, float]:
        members = {name: with_bit(bit, totals.shape[-1]) for bit, name in enumerate(names)}
        voxels = {name: int(counts[chosen].sum()) for name, chosen in members.items()}
        return {name: float(of_codes[members[name]].sum()) / n if n else math.nan for name, n in voxels.items()}

    return [dict(zip(KINDS, map(means, of_one), strict=True)) for of_one in totals]


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
    wanted = KINDS[axial]
    slabs = _slabs(reference_ZYX, [predicted_ZYX], window, valid_ZYX, None)
    return torch.cat([similarity for _, maps in slabs for _, kind, similarity in maps if kind == wanted])


Maps = Iterator[tuple[int, SsimKind, Tensor]]


def _slabs(
    reference_ZYX: Tensor,
    predictions: Sequence[Tensor],
    window: Window,
    valid_ZYX: Tensor | None,
    hidden_ZYX: Tensor | None,
) -> Iterator[tuple[slice, Maps]]:
    """Yield slabs of slices and, lazily, their maps: number of the prediction, kind, similarity ``[n, Y, X]``."""
    depth = reference_ZYX.shape[0]
    dtype = torch.float64 if torch.float64 in {one.dtype for one in (reference_ZYX, *predictions)} else torch.float32
    for start in range(0, depth, _SLAB):
        slab = slice(start, min(start + _SLAB, depth))
        reference = _Slab(reference_ZYX, slab, window, valid_ZYX, hidden_ZYX, dtype)
        yield slab, _maps(reference, predictions)


def _maps(reference: _Slab, predictions: Sequence[Tensor]) -> Maps:
    for number, predicted_ZYX in enumerate(predictions):
        in_plane = reference.filtered_with(predicted_ZYX)
        yield number, "ssim_axial", reference.axial.similarity(in_plane[:, reference.inner])
        yield number, "ssim_3d", reference.in_3d.similarity(_in_depth(in_plane))


class _Slab:
    """Some slices of the reference, with five more at each side, as every prediction is compared with them."""

    def __init__(
        self,
        reference_ZYX: Tensor,
        slab: slice,
        window: Window,
        valid_ZYX: Tensor | None,
        hidden_ZYX: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.shape, self._window, self._dtype = reference_ZYX.shape[1:], window, dtype
        self.inner = slice(SSIM_RADIUS, SSIM_RADIUS + slab.stop - slab.start)
        depth, device = reference_ZYX.shape[0], reference_ZYX.device
        self._z = _mirrored(slab.start - SSIM_RADIUS, slab.stop + SSIM_RADIUS, depth).to(device)
        self._yx = [_mirrored(-SSIM_RADIUS, size + SSIM_RADIUS, size).to(device) for size in self.shape]
        ones = torch.ones((), dtype=torch.bool, device=device).expand(reference_ZYX.shape)
        self._weight = self._padded(ones if valid_ZYX is None else valid_ZYX).to(dtype)
        self._hidden = None if hidden_ZYX is None else self._padded(hidden_ZYX).to(dtype)
        self._x = self._scaled(reference_ZYX).mul_(self._weight)
        in_plane = self._in_plane([self._weight, self._x, self._x * self._x])
        self.axial = _Reference.of(in_plane[:, self.inner], self.shape)
        self.in_3d = _Reference.of(_in_depth(in_plane), self.shape)

    def filtered_with(self, predicted_ZYX: Tensor) -> Tensor:
        """Return what is to be known of a prediction y, filtered in the plane: y, y y and x y, ``[3, n, P]``."""
        y = self._scaled(predicted_ZYX).mul_(self._weight)
        if self._hidden is not None:
            y = torch.lerp(self._x, y, self._hidden)  # the weights are 0 and 1
        return self._in_plane([y, y * y, self._x * y])

    def _padded(self, volume_ZYX: Tensor) -> Tensor:
        """Take the slices of the slab, their faces mirrored."""
        return volume_ZYX[self._z].index_select(1, self._yx[0]).index_select(2, self._yx[1])

    def _scaled(self, volume_ZYX: Tensor) -> Tensor:
        """Take the slab of a volume as numbers 0..1: float32 then keeps the variances apart from the constants."""
        lo, hi = self._window
        return self._padded(volume_ZYX).to(self._dtype).clamp_(lo, hi).sub_(lo).div_(hi - lo)

    def _in_plane(self, maps: list[Tensor]) -> Tensor:
        """Filter padded slices along x and y: ``[M, n, P]``, rows of which the last ten numbers mean nothing."""
        row = maps[0].shape[2]
        flat = [one.flatten(1) for one in maps]
        out = flat[0].new_zeros(len(flat), len(flat[0]), flat[0].shape[1] - 2 * SSIM_RADIUS * row)
        for one, to in zip(flat, out, strict=True):
            for some in _parts(len(one), one.shape[1], one.device):
                _weighted(_weighted(one[some], 1, 1), 1, row, to[some, : -2 * SSIM_RADIUS])
        return out


@dataclass(frozen=True)
class _Reference:
    """The local statistics of the reference; each ``[n, P]``."""

    shape: torch.Size
    weight: Tensor
    """One over the sum of the weights."""
    mean: Tensor
    square: Tensor
    """Of the mean, and a constant."""
    variance: Tensor
    """And a constant."""

    @classmethod
    def of(cls, filtered: Tensor, shape: torch.Size) -> _Reference:
        """Take them from the filtered weights, values and squares."""
        weight = filtered[0].clamp_min(torch.finfo(filtered.dtype).tiny).reciprocal()
        mean, square = filtered[1] * weight, filtered[2] * weight
        return cls(shape, weight, mean, mean * mean + _C1, square.addcmul_(mean, mean, value=-1).add_(_C2))

    def similarity(self, filtered: Tensor) -> Tensor:
        """Return the map of a prediction, ``[n, Y, X]``, from its filtered y, y y and x y."""
        out = torch.empty_like(self.mean)
        for some in _parts(len(out), out.shape[1], out.device):
            weight, mean_x = self.weight[some], self.mean[some]
            mean_y, mean_yy, mean_xy = (one[some] * weight for one in filtered)
            both = mean_x * mean_y
            above = mean_xy.sub_(both).mul_(2).add_(_C2).mul_(both.mul_(2).add_(_C1))
            mean_y.mul_(mean_y)
            below = mean_yy.sub_(mean_y).add_(self.variance[some]).mul_(mean_y.add_(self.square[some]))
            torch.div(above, below, out=out[some])
        height, width = self.shape
        return out.view(-1, height, width + 2 * SSIM_RADIUS)[..., :width]


def _in_depth(maps_MnP: Tensor) -> Tensor:
    """Filter along z: ten slices less."""
    out = maps_MnP.new_empty(len(maps_MnP), maps_MnP.shape[1] - 2 * SSIM_RADIUS, maps_MnP.shape[2])
    for one, to in zip(maps_MnP, out, strict=True):
        for some in _parts(len(to), to.shape[1], to.device):
            _weighted(one[some.start : some.stop + 2 * SSIM_RADIUS], 0, 1, to[some])
    return out


def _weighted(numbers: Tensor, axis: int, step: int, out: Tensor | None = None) -> Tensor:
    """Filter along an axis on which neighbours lie ``step`` numbers apart, without faces: it gets shorter."""
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    first, *others = (taps / taps.sum()).tolist()
    length = numbers.shape[axis] - 2 * SSIM_RADIUS * step
    total = torch.mul(numbers.narrow(axis, 0, length), first, out=out)
    for shift, weight in enumerate(others, start=1):
        total.add_(numbers.narrow(axis, shift * step, length), alpha=weight)
    return total


def _parts(count: int, size: int, device: torch.device) -> Iterator[slice]:
    """Cut ``count`` slices of ``size`` numbers into parts that are computed at once."""
    at_once = count if device.type == "cuda" else max(1, _AT_ONCE // size)
    for start in range(0, count, at_once):
        yield slice(start, min(start + at_once, count))


def _mirrored(start: int, stop: int, size: int) -> Tensor:
    """Return the indices start .. stop - 1 folded back into 0 .. size - 1: d c b a | a b c d | d c b a."""
    index = torch.arange(start, stop) % (2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)
