"""Scoring a run beside two naive baselines, on volumes it was not trained on.

The protocol: ``docs/explanation/metrics.md``.

Shapes: B samples, Z Y X voxels of a crop or of a volume; the tensors of a volume are not batched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maesil.cache.provenance import notes_on_spacing
from maesil.data.crops import grid_origins
from maesil.data.scans import EARLIER, known_scans, same_patients
from maesil.data.split import Split, read_split
from maesil.devices import pick_device
from maesil.documents import write_json
from maesil.errors import NoInputError, UsageError
from maesil.evaluation.encoder_use import encoder_use, warning_of_unused_encoders
from maesil.evaluation.lpips import Lpips
from maesil.evaluation.metrics import REGIONS, BorderSums, ErrorSums, Region, patch_rmse, region_voxels, ssim
from maesil.evaluation.predict import ModelPredictor, Predictor, Reconstruction, make_predictors, reconstruct
from maesil.evaluation.scores import HU_CLASSES, RegionScores, Report, VolumeRow, as_json_has_it, summarise
from maesil.files import make_folder, require_file_place, results_at_once
from maesil.installed import PICTURES, not_installed
from maesil.progress import progress
from maesil.store.filters import select
from maesil.store.grid import box_at
from maesil.store.index import superpatch_table
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.text import counted
from maesil.training.checkpoint import Run, load_run
from maesil.types import Edges, zyx

Box = tuple[slice, slice, slice]


def evaluate(
    run_dir: Path,
    store_path: StorePlace,
    *,
    out: Path | None = None,
    json_path: Path | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    volumes: Sequence[str] | None = None,
    where: str = "",
    split_file: Path | None = None,
    lpips_weights: Path | None = None,
) -> Report:
    """Score a run and the naive baselines on a store; write ``scores.json`` and pictures to ``out``.

    ``out`` is RUN/evaluation by default. ``volumes`` are ids (or unique beginnings of them), or ``["all"]``; default:
    every volume whose patient the run was not trained on, and UsageError where there is none. ``where`` keeps the
    volumes of which a filter (`maesil.store.filters`) takes any superpatch; ``split_file`` scores the test patients of
    a frozen split. Equal ``seed``, run and store give equal masks for all models. ``lpips_weights`` is the file that
    LPIPS is computed with, see `maesil.evaluation.lpips`. Raises CheckpointError, StoreError, NoInputError.
    """
    run = load_run(run_dir, pick_device(str(device)))
    store = Store.open(store_path)
    lpips = Lpips.load(lpips_weights, next(run.model.parameters()).device) if lpips_weights else None
    known = known_scans([run_dir])
    leaders, unchecked = known.patients(store)
    split = read_split(split_file, leaders)[0] if split_file else run.split
    seen = replace(run.split, train=(*run.split.train, *sorted(known.groups("train", EARLIER) - {*run.split.train})))
    chosen = taken(store, choose_volumes(store, seen, volumes, leaders, split.test if split_file else None), where)
    out = out or run_dir / "evaluation"
    make_folder(out)
    if json_path:
        require_file_place(json_path)

    reader, predictors, undrawn = SuperpatchReader(store), make_predictors(run), not_installed(PICTURES)
    scored: list[VolumeRow] = []
    pictures: list[Path] = []
    with results_at_once(out) as drawn_in, progress({"evaluate": "predicted volume"}) as report_progress:
        for number, volume in enumerate(chosen):
            for predictor, (result, rows) in zip(
                predictors, evaluate_volume(run, reader, volume, predictors, seed, lpips), strict=True
            ):
                scored += rows
                if isinstance(predictor, ModelPredictor) and predictor.pictured and not undrawn:
                    pictures += (out / path.name for path in _draw(run, reader, volume, result, drawn_in))
            report_progress("evaluate", number + 1, len(chosen))

    trained_on = same_patients(leaders, seen.train)
    report = summarise(run_dir, run, store, chosen, seed, scored, pictures, trained_on)
    report.facts["weights_sha256"] = run.weights_sha256()
    warnings = warning_of_unused_encoders(report.rows)
    no_pictures = [f"no pictures: {undrawn} is not installed"] if undrawn else []
    notes = (*report.notes, *warnings, *unchecked, *notes_on_spacing(run_dir, store), *no_pictures)
    if lpips:
        report.facts["lpips_weights_sha256"] = lpips.sha256
        notes += lpips.notes
    report = replace(report, notes=notes)
    # The pictures are there; scores of others must not stay beside them.
    for path in {out / "scores.json", json_path or out / "scores.json"}:
        write_json(path, report.document())
    return report


def taken(store: Store, volumes: list[Volume], where: str) -> list[Volume]:
    """Return the volumes of which a filter takes any superpatch; UsageError where there is none."""
    if not where:
        return volumes
    ids = {volume_id for volume_id, _ in select(superpatch_table(store), where)}
    kept = [volume for volume in volumes if volume.volume_id in ids]
    if not kept:
        raise UsageError(f"--where: {where!r} takes none of {counted(len(volumes), 'volume')} to score; change it")
    return kept


def choose_volumes(
    store: Store,
    split: Split,
    names: Sequence[str] | None,
    leaders: Mapping[str, str] | None = None,
    test: Sequence[str] | None = None,
) -> list[Volume]:
    """Return the volumes to score; without names, those of patients neither trained on nor, where others were set
    aside for scores, validated on.

    Patients are compared by their group; ``leaders`` (`maesil.store.index.patients`) recognises copies of their
    scans under other groups too. ``test`` are the only groups to take, UsageError if the run was trained on any.
    """
    leaders = leaders or {}
    volumes = store.volumes()
    if not volumes:
        raise NoInputError(f"{store.path}: the store holds no volumes; run `maesil ingest` first")
    if names is not None and "all" in names:
        return volumes
    if names:
        named = {volume.volume_id: volume for volume in map(store.volume, names)}
        return [volume for _, volume in sorted(named.items())]
    seen = {*split.train, *(split.validation if split.test else ())}
    seen = {leaders.get(group, group) for group in seen}
    unseen = [volume for volume in volumes if leaders.get(volume.group, volume.group) not in seen]
    if test is not None:
        wanted = [volume for volume in volumes if volume.group in test]
        if not wanted:
            raise UsageError(
                f"{store.path}: expected patients that the split sets aside for scores, found none among its "
                f"{counted(len(volumes), 'volume')}; name the store that the split was made for"
            )
        if known := [volume for volume in wanted if volume not in unseen]:
            learnt = {leaders.get(group, group) for group in split.train}
            trained = sum(leaders.get(volume.group, volume.group) in learnt for volume in known)
            validated = f" and validated on {len(known) - trained}" if len(known) > trained else ""
            raise UsageError(
                f"{store.path}: the run was trained on {trained}{validated} of {counted(len(wanted), 'volume')} that "
                "the split sets aside for scores; train with the same --split"
            )
        unseen = wanted
    if not unseen:
        raise UsageError(
            f"{store.path}: the run was trained on every patient of {counted(len(volumes), 'volume')}, so nothing is "
            "left to score fairly; evaluate on another store, or name volumes with --volumes ID, or --volumes all for "
            "every one"
        )
    return unseen


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
        for _, of_volume in evaluate_volume(run, reader, volume, predictors, seed, lpips):
            rows += map(as_json_has_it, of_volume)
    return rows


def evaluate_volume(
    run: Run,
    reader: SuperpatchReader,
    volume: Volume,
    predictors: Iterable[Predictor],
    seed: int,
    lpips: Lpips | None = None,
) -> Iterator[tuple[Reconstruction, list[VolumeRow]]]:
    """Yield, for each predictor, the predicted volume and its rows."""
    device = next(run.model.parameters()).device
    reference = torch.from_numpy(reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)).to(device)
    valid, body = (torch.from_numpy(reader.read_map(volume.volume_id, name)).to(device) for name in ("valid", "body"))
    regions = region_voxels(valid, body, volume.shape)
    for predictor in predictors:
        result = reconstruct(reader, volume, predictor, run.config, seed, device)
        rows: list[VolumeRow] = [
            {"model": predictor.name, "volume_id": volume.volume_id, "group": volume.group, **row}
            for row in score_volume(reference, result, regions, run, lpips)
        ]
        if isinstance(predictor, ModelPredictor):
            by_region = encoder_use(run, reader, volume, predictor, result, reference, regions, seed)
            for row in rows:
                if "group_by" not in row:
                    use = by_region[row["region"]]
                    row["encoder_gain_db"] = use.gain_db
                    row["encoder_gain_shuffled_db"] = use.gain_shuffled_db
                    row["effective_rank"] = use.effective_rank
        yield result, rows


def score_volume(
    reference: Tensor, result: Reconstruction, regions: dict[Region, Tensor], run: Run, lpips: Lpips | None = None
) -> Iterator[RegionScores]:
    """Yield one volume's scores: a row per region, then rows by HU class and by column, which name their group."""
    window, config = run.intensity.window, run.config.model
    hidden, predicted = result.hidden, result.predicted
    pasted = torch.where(hidden, predicted, reference.float())
    similar = {
        name: ssim(reference, pasted, window, regions, valid_ZYX=regions["whole"], axial=name == "ssim_axial")
        for name in ("ssim_3d", "ssim_axial")
    }
    perceptual = {}
    if lpips:
        perceptual["body"] = lpips.of_volume(
            reference, pasted, window, valid_ZYX=regions["whole"], body_ZYX=regions["body"]
        )
    for region in REGIONS:
        borders = BorderSums(config.patch, config.crop, window)
        borders.add(reference, predicted, hidden & regions[region])
        spread = patch_rmse(reference, predicted, hidden, regions[region], window, config.patch).cpu()
        row = _with_errors({"region": region}, reference, predicted, hidden, regions[region], run)
        row["ssim_3d"] = similar["ssim_3d"][region]
        row["ssim_axial"] = similar["ssim_axial"][region]
        row["lpips"] = perceptual.get(region, math.nan)
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


def _with_errors(
    row: RegionScores, reference: Tensor, predicted: Tensor, hidden: Tensor, voxels: Tensor, run: Run
) -> RegionScores:
    """Return a row with the scores that come from the squared and absolute errors of some voxels."""
    sums = ErrorSums(run.intensity.window)
    sums.add(reference, predicted, hidden, voxels)
    nothing_hidden = run.config.mask.kind == "none"
    row["psnr_hidden"] = math.nan if nothing_hidden else sums.psnr_hidden
    row["psnr_whole"] = sums.psnr_whole
    row["psnr_pasted"] = math.nan if nothing_hidden else sums.psnr_pasted
    row["mae_hu"] = sums.mae_hu
    return row


def crop_with_most_body(reader: SuperpatchReader, volume: Volume, crop: Edges) -> Box:
    """Return the crop of the aligned grid that holds the most body."""
    origin = max(
        grid_origins(volume, crop),
        key=lambda start: int(reader.read_map_region(volume.volume_id, "body", start, zyx(crop)).sum(dtype=np.int64)),
    )
    return box_at(origin, crop)


def _draw(run: Run, reader: SuperpatchReader, volume: Volume, result: Reconstruction, out: Path) -> list[Path]:
    """Draw the crop with the most body, and the whole volume in three planes."""
    from maesil.pictures import save_reconstruction  # matplotlib, which not all machines have

    hu = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    predicted, hidden = result.predicted.cpu().numpy(), result.hidden.cpu().numpy()
    window, short = run.intensity.window, volume.volume_id[:8]
    crop = crop_with_most_body(reader, volume, run.config.model.crop)
    at = ", ".join(f"{axis} {part.start}" for axis, part in zip("zyx", crop, strict=True))
    boxes = {
        "volume": ((slice(None),) * 3, "whole volume"),
        "crop": (crop, f"crop at {at}"),
    }
    paths = []
    for name, (box, told) in boxes.items():
        path = out / f"{volume.volume_id}_{name}.png"
        title = f"volume {short}, {told}, step {run.step}"
        save_reconstruction(path, hu[box], hidden[box], predicted[box], window, title, volume.spacing)
        paths.append(path)
    return paths
