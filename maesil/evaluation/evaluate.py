"""Scoring a run beside two naive baselines, on volumes it was not trained on.

The protocol: ``docs/explanation/metrics.md``.

Shapes: B samples, Z Y X voxels of a crop or of a volume; the tensors of a volume are not batched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from maesil.cache.provenance import notes_on_spacing
from maesil.data.crops import grid_origins
from maesil.data.known_scans import EARLIER, known_scans, same_patients
from maesil.data.split import Split, read_split
from maesil.devices import pick_device
from maesil.documents import write_json
from maesil.errors import NoInputError, UsageError
from maesil.evaluation.encoder_use import warning_of_unused_encoders
from maesil.evaluation.lpips import Lpips
from maesil.evaluation.predict import Reconstruction, make_predictors
from maesil.evaluation.scores import Report, VolumeRow, summarise
from maesil.evaluation.volume import evaluate_volume
from maesil.files import make_folder, require_file_place, results_at_once
from maesil.installed import PICTURES, not_installed
from maesil.progress import Tally, progress
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
    with results_at_once(out) as drawn_in, progress(_STAGES) as report_progress:
        tally = Tally(report_progress, _totals(reader, chosen, run, pictures=not undrawn))
        for volume in chosen:
            results, rows = evaluate_volume(run, reader, volume, predictors, seed, lpips, tally)
            scored += rows
            if not undrawn:
                pictures += (out / path.name for path in _draw(run, reader, volume, results[0], drawn_in, tally))

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
    ids = select(superpatch_table(store), where).volumes
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


_STAGES = {"predict": "crop", "score": "slice", "draw": "picture"}


def _totals(reader: SuperpatchReader, volumes: Iterable[Volume], run: Run, *, pictures: bool) -> dict[str, int]:
    """Count what an evaluation will go through, by stage."""
    volumes, size = list(volumes), run.config.model.crop_zyx
    crops = sum(
        bool(reader.read_map_region(volume.volume_id, "valid", origin, size).any())
        for volume in volumes
        for origin in grid_origins(volume, size)
    )
    slices = sum(volume.shape[0] for volume in volumes)
    return {"predict": crops, "score": slices} | ({"draw": 2 * len(volumes)} if pictures else {})


def crop_with_most_body(reader: SuperpatchReader, volume: Volume, crop: Edges) -> Box:
    """Return the crop of the aligned grid that holds the most body."""
    origin = max(
        grid_origins(volume, crop),
        key=lambda start: int(reader.read_map_region(volume.volume_id, "body", start, zyx(crop)).sum(dtype=np.int64)),
    )
    return box_at(origin, crop)


def _draw(
    run: Run, reader: SuperpatchReader, volume: Volume, result: Reconstruction, out: Path, tally: Tally
) -> list[Path]:
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
        tally.add("draw", 1)
    return paths
