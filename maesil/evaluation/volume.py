"""One volume predicted and scored: the rows of each predictor.

Shapes: Z Y X voxels of the volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from maesil.evaluation.encoder_use import EncoderTrial, EncoderUse
from maesil.evaluation.lpips import Lpips
from maesil.evaluation.metrics import (
    REGIONS,
    BorderSums,
    ErrorSums,
    Region,
    border_places,
    errors_of_groups,
    patch_rmse,
    region_voxels,
    step_sums,
)
from maesil.evaluation.predict import (
    Batch,
    ModelPass,
    ModelPredictor,
    Predictor,
    Reconstruction,
    reconstruct_by,
)
from maesil.evaluation.scores import HU_CLASSES, RegionScores, VolumeRow, as_json_has_it
from maesil.evaluation.similarity import Similarities, ssim
from maesil.progress import Tally
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.training.checkpoint import Run
from maesil.types import Window


def score_volumes(
    run: Run,
    reader: SuperpatchReader,
    volumes: Iterable[Volume],
    predictors: Sequence[Predictor],
    seed: int,
    lpips: Lpips | None = None,
) -> list[VolumeRow]:
    """Score volumes by every predictor, without pictures: rows of plain values (see `score_volume`)."""
    rows: list[VolumeRow] = []
    for volume in volumes:
        rows += map(as_json_has_it, evaluate_volume(run, reader, volume, predictors, seed, lpips)[1])
    return rows


def evaluate_volume(
    run: Run,
    reader: SuperpatchReader,
    volume: Volume,
    predictors: Sequence[Predictor],
    seed: int,
    lpips: Lpips | None = None,
    tally: Tally | None = None,
) -> tuple[list[Reconstruction], list[VolumeRow]]:
    """Return the volume as each predictor predicts it, and its rows, predictor by predictor."""
    tally, device = tally or Tally(), next(run.model.parameters()).device
    reference = torch.from_numpy(reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)).to(device)
    valid, body = (torch.from_numpy(reader.read_map(volume.volume_id, name)).to(device) for name in ("valid", "body"))
    regions = region_voxels(valid, body, volume.shape)
    models = [one for one in predictors if isinstance(one, ModelPredictor)]
    trial = EncoderTrial(run.intensity.window, models, regions)

    def watch(batch: Batch, passes: list[ModelPass]) -> None:
        if models:
            trial.watch(batch, passes)
        tally.add("predict", len(batch.crops))

    results = reconstruct_by(reader, volume, predictors, run.config, seed, device, watch)
    rows: list[VolumeRow] = []
    scored = score_volume(reference, results, regions, run, lpips, tally)
    for predictor, of_predictor in zip(predictors, scored, strict=True):
        use = trial.result(predictor.name) if predictor in models else {}
        for row in of_predictor:
            if "group_by" not in row and row["region"] in use:
                _add_encoder_use(row, use[row["region"]])
            rows.append({"model": predictor.name, "volume_id": volume.volume_id, "group": volume.group, **row})
    return results, rows


def _add_encoder_use(row: RegionScores, use: EncoderUse) -> None:
    row["encoder_gain_db"], row["encoder_gain_shuffled_db"] = use.gain_db, use.gain_shuffled_db
    row["effective_rank"] = use.effective_rank


def score_volume(
    reference: Tensor,
    results: Sequence[Reconstruction],
    regions: dict[Region, Tensor],
    run: Run,
    lpips: Lpips | None = None,
    tally: Tally | None = None,
) -> list[list[RegionScores]]:
    """Return a volume's scores for each of its predictions, which were all made under the same masks.

    They are a row for each region, then rows by HU class and by column, which name their group. What the reference
    says alone is computed once for all predictions.
    """
    tally, window, hidden = tally or Tally(), run.intensity.window, results[0].hidden
    similar = ssim(
        reference, [one.predicted for one in results], window, regions, valid_ZYX=regions["whole"], hidden_ZYX=hidden,
        report=lambda slices: tally.add("score", slices),
    )  # fmt: skip
    groups = _groups(reference, results[0], regions, run)
    in_groups = groups | {("", region): voxels for region, voxels in regions.items()}
    patch, crop = run.config.model.patch, run.config.model.crop
    places = border_places(patch, crop, {region: hidden & regions[region] for region in REGIONS})
    reference_steps = step_sums(reference, places, window)
    scored = []
    for result, similarity in zip(results, similar, strict=True):
        errors = errors_of_groups(reference, result.predicted, hidden, in_groups, window)
        steps = step_sums(result.predicted, places, window)
        rows = []
        for region in REGIONS:
            borders = BorderSums(patch, crop, window, torch.stack([steps[region], reference_steps[region]]))
            spread = patch_rmse(reference, result.predicted, hidden, regions[region], window, patch)
            rows.append(_row_of_region(region, errors["", region], similarity, borders, spread, run))
        if lpips:
            rows[REGIONS.index("body")]["lpips"] = _perceptual(lpips, reference, result, regions, window)
        rows += [_row_of_group(name, errors[name], run) for name in groups]
        scored.append(rows)
    return scored


def _groups(
    reference: Tensor, result: Reconstruction, regions: dict[Region, Tensor], run: Run
) -> dict[tuple[str, str], Tensor]:
    """Return the groups of voxels that have rows of their own: by HU class, and by column where any is hidden."""
    groups = {("hu_class", name): (reference >= lo) & (reference < hi) for name, (lo, hi) in HU_CLASSES.items()}
    if run.config.mask.kind != "none":
        groups["column", "hidden everywhere"] = result.column_hidden
        groups["column", "partly visible"] = result.hidden & ~result.column_hidden
    return {name: voxels & regions["body"] for name, voxels in groups.items()}


def _row_of_region(
    region: Region, errors: ErrorSums, similarity: Similarities, borders: BorderSums, spread: Tensor, run: Run
) -> RegionScores:
    row = _with_errors({"region": region}, errors, run)
    row["ssim_3d"], row["ssim_axial"] = similarity["ssim_3d"][region], similarity["ssim_axial"][region]
    row["lpips"] = math.nan
    row["border_ratio"], row["seam_ratio"] = borders.ratio, borders.seam_ratio
    percentiles = [float(np.percentile(spread.cpu(), q)) for q in (10, 50, 90)] if len(spread) else None
    row["patch_rmse_hu"] = percentiles
    return row


def _row_of_group(name: tuple[str, str], errors: ErrorSums, run: Run) -> RegionScores:
    return _with_errors({"region": "body", "group_by": name[0], "group_name": name[1]}, errors, run)


def _with_errors(row: RegionScores, sums: ErrorSums, run: Run) -> RegionScores:
    """Return a row with the scores that come from squared and absolute errors."""
    nothing_hidden = run.config.mask.kind == "none"
    row["psnr_hidden"] = math.nan if nothing_hidden else sums.psnr_hidden
    row["psnr_whole"] = sums.psnr_whole
    row["psnr_pasted"] = math.nan if nothing_hidden else sums.psnr_pasted
    row["mae_hu"] = sums.mae_hu
    return row


def _perceptual(
    lpips: Lpips, reference: Tensor, result: Reconstruction, regions: dict[Region, Tensor], window: Window
) -> float:
    pasted = torch.where(result.hidden, result.predicted, reference.float())
    return lpips.of_volume(reference, pasted, window, valid_ZYX=regions["whole"], body_ZYX=regions["body"])
