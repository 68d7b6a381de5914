"""The scores as they were first written: volume by volume, prediction by prediction, model pass by model pass.

`maesil.evaluation` takes them together and in place; tests and `benchmarks/evaluation_speed.py` hold it to this.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from maesil.evaluation.metrics import REGIONS, BorderSums, ErrorSums, clip, region_voxels
from maesil.evaluation.naive import ITERATIONS, TENSION, InterpolationBaseline, _mean_of_known, _visible
from maesil.evaluation.predict import ModelPredictor, make_predictors, reconstruct
from maesil.evaluation.scores import HU_CLASSES
from maesil.evaluation.similarity import SSIM_K1, SSIM_K2, SSIM_RADIUS, SSIM_SIGMA, _mirrored
from maesil.models.latent import LatentStatistics, mean_over_crop, shuffled
from maesil.models.masked_input import MaskedInput
from maesil.models.patches import to_hu, unpatchify
from maesil.types import zyx

_SLAB = 16


def volume_rows(run, reader, volume, seed):
    """Score one volume by every predictor: rows as of `maesil.evaluation.volume.evaluate_volume`."""
    device = torch.device("cpu")
    reference = torch.from_numpy(reader.read_region(volume.volume_id, (0, 0, 0), volume.shape))
    valid, body = (torch.from_numpy(reader.read_map(volume.volume_id, name)) for name in ("valid", "body"))
    regions = region_voxels(valid, body, volume.shape)
    for predictor in make_predictors(run):
        slow = SlowInterpolation(predictor) if isinstance(predictor, InterpolationBaseline) else predictor
        slow = SlowModel(predictor) if isinstance(predictor, ModelPredictor) else slow
        result = reconstruct(reader, volume, slow, run.config, seed, device)
        rows = list(score_volume(reference, result, regions, run))
        if isinstance(predictor, ModelPredictor):
            gains = encoder_use(run, reader, volume, slow, result, reference, regions, seed, device)
            for row in rows:
                if "group_by" not in row:
                    row |= gains[row["region"]]
        yield from ({"model": predictor.name, **row} for row in rows)


class SlowModel:
    """A model's predictions, one forward pass of all of it at a time."""

    def __init__(self, predictor):
        self.name, self.inner = predictor.name, predictor

    @torch.no_grad()
    def predict_hu(self, volume_BZYX, masks, valid_BZYX=None):
        """Predict every voxel."""
        inner = self.inner
        inputs = MaskedInput(volume_BZYX, masks, inner.intensity, inner.model.config.patch)
        tokens_BLV = inner.model.predict_all(inputs, pictured=inner.pictured)
        return unpatchify(to_hu(tokens_BLV.float(), inner.intensity), inner.model.config.grid, inputs.patch)


class SlowInterpolation:
    """The spline, every step of it in fresh memory."""

    def __init__(self, predictor):
        self.name, self.window, self.patch = predictor.name, predictor.window, predictor.patch

    def predict_hu(self, volume_BZYX, masks, valid_BZYX=None):
        """Predict every voxel."""
        values, known = _visible(volume_BZYX, masks, valid_BZYX, self.window, self.patch)
        each, coarsest = zip(values.split(1), known.split(1), strict=True), max(zyx(self.patch))
        filled = [spline_in_tension(value, one, coarsest=coarsest) for value, one in each]
        return torch.cat(filled).clamp(*self.window)


def encoder_use(run, reader, volume, predictor, unchanged, reference, regions, seed, device):
    """What the encoder is worth, by whole passes with other latent tokens."""
    statistics, model = LatentStatistics(), predictor.inner.model
    name = "psnr_whole" if run.config.mask.kind == "none" else "psnr_hidden"

    def scores(result):
        found = {}
        for region, voxels in regions.items():
            sums = ErrorSums(run.intensity.window)
            sums.add(reference, result.predicted, result.hidden, voxels)
            found[region] = getattr(sums, name)
        return found

    def with_change(change):
        with model.latent_changed(change):
            return scores(reconstruct(reader, volume, predictor, run.config, seed, device))

    as_it_is = scores(unchanged)
    by_mean, by_order = with_change(lambda tokens: mean_over_crop(statistics(tokens))), with_change(shuffled)
    return {
        region: {
            "encoder_gain_db": as_it_is[region] - by_mean[region],
            "encoder_gain_shuffled_db": as_it_is[region] - by_order[region],
            "effective_rank": statistics.effective_rank,
        }
        for region in regions
    }


def score_volume(reference, result, regions, run):
    """Yield one volume's scores: a row per region, then rows by HU class and by column, which name their group."""
    window, config = run.intensity.window, run.config.model
    hidden, predicted = result.hidden, result.predicted
    pasted = torch.where(hidden, predicted, reference.float())
    similar = {
        name: ssim(reference, pasted, window, regions, valid_ZYX=regions["whole"], axial=name == "ssim_axial")
        for name in ("ssim_3d", "ssim_axial")
    }
    for region in REGIONS:
        borders = SlowBorderSums(config.patch, config.crop, window)
        borders.add(reference, predicted, hidden & regions[region])
        spread = patch_rmse(reference, predicted, hidden, regions[region], window, config.patch).cpu()
        row = _with_errors({"region": region}, reference, predicted, hidden, regions[region], run)
        row["ssim_3d"] = similar["ssim_3d"][region]
        row["ssim_axial"] = similar["ssim_axial"][region]
        row["lpips"] = math.nan
        row["border_ratio"] = borders.ratio
        row["seam_ratio"] = borders.seam_ratio
        row["patch_rmse_hu"] = [float(np.percentile(spread, q)) for q in (10, 50, 90)] if len(spread) else None
        yield row
    in_body = regions["body"]
    groups = {("hu_class", name): (reference >= lo) & (reference < hi) for name, (lo, hi) in HU_CLASSES.items()}
    if run.config.mask.kind != "none":
        groups["column", "hidden everywhere"] = result.column_hidden
        groups["column", "partly visible"] = hidden & ~result.column_hidden
    for (by, name), chosen in groups.items():
        row = {"region": "body", "group_by": by, "group_name": name}
        yield _with_errors(row, reference, predicted, hidden, in_body & chosen, run)


def _with_errors(row, reference, predicted, hidden, voxels, run):
    """Return a row with the scores that come from the squared and absolute errors of some voxels."""
    sums = ErrorSums(run.intensity.window)
    sums.add(reference, predicted, hidden, voxels)
    nothing_hidden = run.config.mask.kind == "none"
    row["psnr_hidden"] = math.nan if nothing_hidden else sums.psnr_hidden
    row["psnr_whole"] = sums.psnr_whole
    row["psnr_pasted"] = math.nan if nothing_hidden else sums.psnr_pasted
    row["mae_hu"] = sums.mae_hu
    return row


def patch_rmse(
    reference_ZYX: Tensor,
    predicted_ZYX: Tensor,
    hidden_ZYX: Tensor,
    region_ZYX: Tensor,
    window,
    patch,
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
    window,
    regions,
    *,
    valid_ZYX=None,
    axial: bool = False,
):
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


class SlowBorderSums(BorderSums):
    """The same sums, axis by axis and place by place."""

    def add(self, reference_ZYX: Tensor, predicted_ZYX: Tensor, counted_ZYX: Tensor) -> None:
        """Add all pairs of face neighbours that are both in ``counted_ZYX``."""
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
                    self.sums[which, place] += total.cpu()


def _patch_sums(voxels_ZYX: Tensor, patch):
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
    window,
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


def spline_in_tension(
    values_BZYX: Tensor,
    known_BZYX: Tensor,
    *,
    coarsest: int = 8,
    tension: float = TENSION,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Fill the unknown voxels: what `maesil.evaluation.naive.spline_in_tension` says."""
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
