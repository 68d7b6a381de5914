"""Scoring a run beside the two floors, on volumes it was not trained on. Protocol: ``docs/explanation/metrics.md``.

Shapes: B samples, Z Y X voxels of a crop or of a volume; the tensors of a volume are not batched.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from maesil.cache.reader import SuperpatchReader
from maesil.checkpoint import Run, load_run
from maesil.commit import Volume
from maesil.config import RunConfig
from maesil.data import Crop, Split, grid_crops, grid_origins
from maesil.errors import NoInputError, UsageError
from maesil.floors import InterpolationFloor, MeanFloor
from maesil.masked_input import MaskedInput
from maesil.masking import Masks, make_masks
from maesil.metrics import BorderSums, ErrorSums, expand_cells, patch_rmse, region_voxels, ssim
from maesil.model import ReconstructionModel
from maesil.patches import to_hu, unpatchify
from maesil.pictures import save_reconstruction
from maesil.progress import progress
from maesil.store import Store
from maesil.train import pick_device
from maesil.types import AIR_HU, MAP_CELL, Intensity, Zyx

REGIONS = ("body", "whole")

ERROR_SCORES = ("psnr_hidden", "psnr_whole", "psnr_pasted", "mae_hu")

SCORES = ("psnr_hidden", "psnr_whole", "psnr_pasted", "ssim_3d", "ssim_axial", "lpips", "mae_hu", "border_ratio")
"""The scores of a row, in order: dB, dB, dB, 1, 1, 1, HU, 1."""

HU_CLASSES = {"lung": (-1024, -500), "fat": (-150, -30), "soft": (-30, 150), "bone": (150, 3072)}
"""Reference HU from .. below (ours); the rest, mostly partial volume between lung and fat, is in no class."""

THICKNESS = {"<= 2 mm": (0.0, 2.0), "2-3.5 mm": (2.0, 3.5), "> 3.5 mm": (3.5, math.inf)}
"""Native distance between slices: above .. up to and including (mm)."""

Row = dict[str, Any]


class Predictor(Protocol):
    """Whatever fills in hidden patches; all of them are given the same crops and the same masks."""

    name: str

    def predict_hu(self, volume_BZYX: Tensor, masks: Masks, valid_BZYX: Tensor | None = None) -> Tensor:
        """Predict every voxel of int16 HU crops: float32 HU ``[B, Z, Y, X]``; ``valid_BZYX`` bool, inside the scan."""


class ModelPredictor:
    """A trained model as it puts voxels out: hidden patches, and visible ones no loss ever taught it."""

    def __init__(self, model: ReconstructionModel, intensity: Intensity) -> None:
        self.name = model.config.kind
        self.model, self.intensity = model.eval(), intensity

    @torch.no_grad()
    def predict_hu(self, volume_BZYX: Tensor, masks: Masks, valid_BZYX: Tensor | None = None) -> Tensor:
        """Predict every voxel, float32 HU ``[B, Z, Y, X]`` clipped to the window."""
        config = self.model.config
        tokens_BLV = self.model.predict_all(MaskedInput(volume_BZYX, masks, self.intensity, config.patch))
        return unpatchify(to_hu(tokens_BLV.float(), self.intensity), config.grid, config.patch)


@dataclass(frozen=True)
class Reconstruction:
    """A volume predicted crop by crop. All ``[Z, Y, X]``."""

    predicted: Tensor
    """Float32 HU; -1024 where there was nothing to predict from (no valid voxel in the crop)."""
    hidden: Tensor
    """Bool: hidden from the predictor."""
    column_hidden: Tensor
    """Bool: hidden, and all of its column in the crop as well."""


@dataclass(frozen=True)
class Report:
    """What an evaluation found; ``rows`` are those of ``docs/explanation/metrics.md``."""

    facts: dict[str, Any]
    rows: list[Row]
    rows_other: list[Row]
    per_volume: list[Row]
    pictures: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return everything as plain values; what does not apply is None."""
        return {
            **self.facts,
            "notes": list(self.notes),
            "rows": self.rows,
            "rows_other": self.rows_other,
            "per_volume": self.per_volume,
        }

    def table(self) -> Table:
        """Return the rows as a table for people."""
        volumes, lo_hi = len({row["volume_id"] for row in self.per_volume}), self.facts["window"]
        title = (
            f"{self.facts['run']}, step {self.facts['step']}: {volumes} volume{'s' * (volumes != 1)}, "
            f"window {lo_hi[0]:g} to {lo_hi[1]:g} HU, {self.facts['mask']} mask, seed {self.facts['seed']}"
        )
        caption = "\n".join(("PSNR in dB, mean over volumes, ± over patients.", *self.notes))
        table = Table(title=title, caption=caption, caption_justify="left")
        table.add_column("region")
        table.add_column("model")
        for header in ("PSNR hidden", "whole", "pasted", "SSIM 3D", "axial", "MAE HU", "border ratio"):
            table.add_column(header, justify="right")
        for row in self.rows:
            shown = [_number(row[name], digits) for name, digits in _SHOWN]
            shown[0] += self._spread(row)
            table.add_row(row["region"], row["model"], *shown, end_section=row["model"] == "interpolation")
        return table

    def _spread(self, row: Row) -> str:
        per_patient: dict[str, list[float]] = {}
        for one in self.per_volume:
            if (one["model"], one["region"]) == (row["model"], row["region"]) and one["psnr_hidden"] is not None:
                per_patient.setdefault(one["group"], []).append(one["psnr_hidden"])
        means = [float(np.mean(values)) for values in per_patient.values()]
        return f" ± {np.std(means, ddof=1):.2f}" if len(means) > 1 else ""


_SHOWN = (
    ("psnr_hidden", 2), ("psnr_whole", 2), ("psnr_pasted", 2), ("ssim_3d", 3), ("ssim_axial", 3), ("mae_hu", 1),
    ("border_ratio", 2),
)  # fmt: skip


def evaluate(
    run_dir: Path,
    store_path: Path,
    *,
    out: Path | None = None,
    json_path: Path | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    volumes: Sequence[str] | None = None,
) -> Report:
    """Score a run and the floors on a store; write ``scores.json`` and pictures to ``out`` (default RUN/evaluation).

    ``volumes`` are ids (or unique beginnings of them), or ``["all"]``; default: every volume whose patient the run was
    not trained on, and UsageError where there is none. Equal ``seed``, run and store give equal masks for all models.
    Raises CheckpointError, StoreError, NoInputError.
    """
    run = load_run(run_dir, pick_device(str(device)))
    store = Store.open(store_path)
    chosen = choose_volumes(store, run.split, volumes)
    out = out or run_dir / "evaluation"
    out.mkdir(parents=True, exist_ok=True)

    reader, predictors = SuperpatchReader(store), make_predictors(run)
    scored: list[Row] = []
    pictures: list[Path] = []
    with progress({"evaluate": "predicted volumes"}) as report_progress:
        for number, volume in enumerate(chosen):
            rows, drawn = evaluate_volume(run, reader, volume, predictors, seed, out)
            scored, pictures = scored + rows, pictures + drawn
            report_progress("evaluate", number + 1, len(chosen))

    report = summarise(run_dir, run, store, chosen, seed, scored, pictures)
    for path in {out / "scores.json", json_path or out / "scores.json"}:
        _write_json(path, report.document())
    return report


def choose_volumes(store: Store, split: Split, names: Sequence[str] | None) -> list[Volume]:
    """Return the volumes to score; without names, those of patients outside the training split.

    Patients are compared by their group, so a store made with another key does not recognise them.
    """
    volumes = store.volumes()
    if not volumes:
        raise NoInputError(f"{store.path}: the store holds no volumes; run `maesil ingest` first")
    if names is not None and "all" in names:
        return volumes
    if names:
        named = {volume.volume_id: volume for volume in map(store.volume, names)}
        return [volume for _, volume in sorted(named.items())]
    unseen = [volume for volume in volumes if volume.group not in split.train]
    if not unseen:
        raise UsageError(
            f"{store.path}: the run was trained on the patients of all {len(volumes)} volumes, so nothing is left to "
            "score fairly; evaluate on another store, or name volumes with --volumes ID, or --volumes all for every one"
        )
    return unseen


def make_predictors(run: Run) -> tuple[Predictor, ...]:
    """Return the model and the floors, which know the window and the patches but were trained on nothing."""
    window, patch = run.intensity.window, run.config.model.patch
    return ModelPredictor(run.model, run.intensity), MeanFloor(window, patch), InterpolationFloor(window, patch)


def mask_seed(seed: int, volume_id: str, origin: Zyx) -> int:
    """Return the seed of one crop's mask: SHA-256 of (seed, volume, origin), the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{volume_id}:{origin[0]}:{origin[1]}:{origin[2]}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def reconstruct(
    reader: SuperpatchReader, volume: Volume, predictor: Predictor, config: RunConfig, seed: int, device: torch.device
) -> Reconstruction:
    """Predict a volume over its aligned grid of crops, each masked by its own seed (`mask_seed`)."""
    crop, grid = config.model.crop, config.model.grid
    padded = [-(-n // crop) * crop for n in volume.shape]
    predicted = torch.full(padded, float(AIR_HU), device=device)
    hidden, column_hidden = (torch.zeros(padded, dtype=torch.bool, device=device) for _ in range(2))
    for crops in _batches(grid_crops(reader, [volume.volume_id], crop), _crops_at_once(crop, device)):
        hu = torch.from_numpy(np.stack([one.hu for one in crops])).to(device)
        valid = torch.from_numpy(np.stack([one.valid for one in crops])).to(device) == 255
        masks = make_masks(config.mask, grid, [mask_seed(seed, volume.volume_id, one.origin) for one in crops], device)
        values = predictor.predict_hu(hu, masks, expand_cells(valid, MAP_CELL))
        tokens = (masks.mask > 0).view(-1, *grid)
        columns = tokens.all(dim=1, keepdim=True).expand_as(tokens)
        parts = (values, expand_cells(tokens, config.model.patch), expand_cells(columns, config.model.patch))
        for sample, one in enumerate(crops):
            box = tuple(slice(start, start + crop) for start in one.origin)
            for canvas, part in zip((predicted, hidden, column_hidden), parts, strict=True):
                canvas[box] = part[sample]
    inside = tuple(slice(0, n) for n in volume.shape)
    return Reconstruction(predicted[inside], hidden[inside], column_hidden[inside])


def evaluate_volume(
    run: Run, reader: SuperpatchReader, volume: Volume, predictors: Iterable[Predictor], seed: int, out: Path
) -> tuple[list[Row], list[Path]]:
    """Score one volume by every predictor, and draw the model's pictures; return rows and paths."""
    device = next(run.model.parameters()).device
    hu = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    reference = torch.from_numpy(hu).to(device)
    valid, body = (torch.from_numpy(reader.read_map(volume.volume_id, name)).to(device) for name in ("valid", "body"))
    regions = region_voxels(valid, body, volume.shape)
    rows: list[Row] = []
    pictures: list[Path] = []
    for predictor in predictors:
        result = reconstruct(reader, volume, predictor, run.config, seed, device)
        identity = {"model": predictor.name, "volume_id": volume.volume_id, "group": volume.group}
        rows += [{**identity, **row} for row in score_volume(reference, result, regions, run)]
        if isinstance(predictor, ModelPredictor):
            pictures += _draw(run, reader, volume, hu, result, out)
    return rows, pictures


def score_volume(reference: Tensor, result: Reconstruction, regions: dict[str, Tensor], run: Run) -> Iterator[Row]:
    """Yield one volume's scores: a row per region, then rows by HU class and by column, which name their group."""
    window, config = run.intensity.window, run.config.model
    hidden, predicted = result.hidden, result.predicted
    similar = {
        name: ssim(reference, predicted, window, regions, valid_ZYX=regions["whole"], axial=name == "ssim_axial")
        for name in ("ssim_3d", "ssim_axial")
    }
    for region in REGIONS:
        borders = BorderSums(config.patch, config.crop, window)
        borders.add(reference, predicted, hidden & regions[region])
        spread = patch_rmse(reference, predicted, hidden, regions[region], window, config.patch).cpu()
        yield {
            "region": region,
            **_error_scores(reference, predicted, hidden, regions[region], run),
            **{name: values[region] for name, values in similar.items()},
            "border_ratio": borders.ratio,
            "seam_ratio": borders.seam_ratio,
            "patch_rmse_hu": [float(np.percentile(spread, q)) for q in (10, 50, 90)] if len(spread) else None,
        }
    in_body = regions["body"]
    groups = {("hu_class", name): (reference >= lo) & (reference < hi) for name, (lo, hi) in HU_CLASSES.items()}
    groups["column", "hidden everywhere"] = result.column_hidden
    groups["column", "partly visible"] = hidden & ~result.column_hidden
    for (by, name), chosen in groups.items():
        errors = _error_scores(reference, predicted, hidden, in_body & chosen, run)
        yield {"region": "body", "group_by": by, "group_name": name, **errors}


def summarise(
    run_dir: Path, run: Run, store: Store, volumes: list[Volume], seed: int, scored: list[Row], pictures: list[Path]
) -> Report:
    """Average the volumes' scores into rows."""
    facts = {
        "run": str(run_dir),
        "step": run.step,
        "store_fingerprint": store.fingerprint,
        "seed": seed,
        "window": list(run.intensity.window),
        "mask": run.config.mask.kind,
    }
    common = {"table": "A", "input": "masked", "mask": facts["mask"], "seed": seed, "window": facts["window"]}
    of_volumes = [row for row in scored if "group_by" not in row]
    rows = _mean_rows(of_volumes, ("region", "model"), common)

    in_groups = [row for row in scored if "group_by" in row]
    thickness = {volume.volume_id: _thickness(volume) for volume in volumes}
    in_groups += [
        {**row, "group_by": "slice_thickness", "group_name": thickness[row["volume_id"]]} for row in of_volumes
    ]
    others = _mean_rows(in_groups, ("group_by", "group_name", "region", "model"), common)

    trained = sum(volume.group in run.split.train for volume in volumes)
    note = f"{trained} of {len(volumes)} volumes are of patients the run was trained on: no measure of new patients."
    per_volume = [{name: _plain(value) for name, value in row.items()} for row in of_volumes]
    return Report(facts, rows, others, per_volume, tuple(pictures), (note,) if trained else ())


def _error_scores(reference: Tensor, predicted: Tensor, hidden: Tensor, region: Tensor, run: Run) -> Row:
    sums = ErrorSums(run.intensity.window)
    sums.add(reference, predicted, hidden, region)
    return {name: getattr(sums, name) for name in ERROR_SCORES}


def _mean_rows(scored: Iterable[Row], keys: tuple[str, ...], common: Row) -> list[Row]:
    """Average the volumes' rows that agree in ``keys``; models stay in the order they were scored in."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in scored:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: item[0][:-1])
    return [{**dict(zip(keys, values, strict=True)), **common, **_mean_scores(rows)} for values, rows in ordered]


def _mean_scores(rows: list[Row]) -> Row:
    """Average each score over the volumes that have it: None where none has, or where it is infinite."""
    means: Row = {}
    for name in SCORES:
        values = [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]
        means[name] = _plain(float(np.mean(values))) if values else None
    return {**means, "volumes": sum(not math.isnan(row["psnr_hidden"]) for row in rows)}


def _thickness(volume: Volume) -> str:
    return next(name for name, (above, up_to) in THICKNESS.items() if above < volume.source_spacing[0] <= up_to)


def _draw(
    run: Run, reader: SuperpatchReader, volume: Volume, hu: np.ndarray, result: Reconstruction, out: Path
) -> list[Path]:
    """Draw the crop with the most body, and the whole volume in three planes."""
    predicted, hidden = result.predicted.cpu().numpy(), result.hidden.cpu().numpy()
    edge, window, short = run.config.model.crop, run.intensity.window, volume.volume_id[:8]
    origin = max(
        grid_origins(volume, edge),
        key=lambda start: int(reader.read_map_region(volume.volume_id, "body", start, (edge,) * 3).sum(dtype=np.int64)),
    )
    boxes = {
        "volume": (tuple(slice(0, n) for n in volume.shape), "whole volume"),
        "crop": (tuple(slice(o, o + edge) for o in origin), f"crop at z {origin[0]}, y {origin[1]}, x {origin[2]}"),
    }
    paths = []
    for name, (box, told) in boxes.items():
        path = out / f"{volume.volume_id}_{name}.png"
        title = f"volume {short}, {told}, step {run.step}"
        save_reconstruction(path, hu[box], hidden[box], predicted[box], window, title, volume.spacing)
        paths.append(path)
    return paths


def _batches(crops: Iterator[Crop], size: int) -> Iterator[list[Crop]]:
    while batch := list(islice(crops, size)):
        yield batch


def _crops_at_once(crop: int, device: torch.device) -> int:
    """Return how many crops to predict at once: about 2 million voxels on a CPU, 32 million on a GPU."""
    return max(1, (2**25 if device.type == "cuda" else 2**21) // crop**3)


def _plain(value: Any) -> Any:
    """Return None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a file all at once: a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
