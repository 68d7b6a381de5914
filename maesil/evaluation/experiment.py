"""The paper's comparison as one command: MAESIL against AE, VAE, VQ-VAE and a 2D masked autoencoder.

Table A, inpainting: all are given the same masked input and trained on hidden voxels. Table B, reconstruction: all are
given the full input and trained on all valid voxels. Everything below ``DIR`` is either complete or made again:
finished models are not trained twice, an interrupted one goes on. Protocol: ``docs/explanation/metrics.md``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console

from maesil.config.checks import require_known
from maesil.config.presets import PRESETS
from maesil.config.schema import PAPER_KINDS, ModelConfig, RunConfig, require_tile
from maesil.config.toml import from_document
from maesil.data.crops import grid_origins, validation_crops
from maesil.data.sources import Sources
from maesil.data.split import Split, read_split, split_patients
from maesil.devices import pick_device
from maesil.documents import as_json, fields_of, read_json, write_json
from maesil.errors import UsageError
from maesil.evaluation.cost import Cost, measure_cost
from maesil.evaluation.lpips import Lpips
from maesil.evaluation.predict import Predictor, model_predictors, naive_baselines, psnr_of_crops, reconstruct
from maesil.evaluation.report import Experiment, Trained, write_report
from maesil.evaluation.scores import PaperTable, VolumeRow, thickness_of
from maesil.evaluation.volume import score_volumes
from maesil.files import whole_file, write_whole
from maesil.store.grid import box_at
from maesil.store.index import patients
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.text import counted
from maesil.training.checkpoint import Run, load_run
from maesil.training.log import METRICS, read_metrics
from maesil.training.setup import with_steps
from maesil.training.train import train
from maesil.types import HuArray, Zyx

TABLES: dict[PaperTable, str] = {"A": "dual", "B": "none"}
"""The mask under which the models of each table are trained and scored."""


@dataclass(frozen=True)
class ExperimentBudget:
    """One section of ``paper.toml``."""

    name: str
    document: dict[str, Any]

    @classmethod
    def load(cls, name: str, file: Path | None = None) -> ExperimentBudget:
        """Read a budget; UsageError for a name that the file does not hold."""
        text = (
            file.read_text(encoding="utf-8") if file else (files("maesil.evaluation") / "paper.toml").read_text("utf-8")
        )
        budgets = tomllib.loads(text)
        require_known(name, list(budgets), "budget")
        return cls(name, budgets[name])

    def config(self, model: str, table: PaperTable, seed: int, device: str) -> RunConfig:
        """Return how a model is trained for a table."""
        own = self.document[model]
        config = PRESETS[self.document["preset"]]
        for part in (self.document.get("all", {}), {name: own[name] for name in ("model", "train") if name in own}):
            config = from_document(part, config)
        fixed: dict[str, Any] = {
            "model": {"kind": model},
            "mask": {"kind": TABLES[table]},
            "train": {"seed": seed, "device": device, "minutes": float(self.document.get("minutes", 0.0))},
        }
        config = from_document(fixed, config)
        return with_steps(config, own["steps"][table]) if "steps" in own else config


def run_paper_experiment(
    stores: Sequence[StorePlace],
    out: Path,
    budget: ExperimentBudget,
    *,
    seed: int = 0,
    device: str = "auto",
    models: Sequence[str] = PAPER_KINDS,
    tables: Sequence[str] = tuple(TABLES),
    split_file: Path | None = None,
    split_seed: int | None = None,
    lpips_weights: Path | None = None,
    console: Console | None = None,
) -> Experiment:
    """Split the patients, train and score every model for both tables, write tables, curves and pictures to ``out``.

    Several ``stores`` are one data set: patients are split over all of them together, by the budget's shares and
    ``split_seed`` (default: ``seed``), or as the frozen ``split_file`` says. ``models`` and ``tables`` are what is
    trained of the whole. ``lpips_weights`` is the file that LPIPS is computed with, see `maesil.evaluation.lpips`;
    without it that column stays empty. Raises UsageError (another experiment in ``out``, too few patients), StoreError,
    NoInputError, and KeyboardInterrupt after SIGINT, resumable.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    for model in models:
        require_known(model, list(PAPER_KINDS), "model of the experiment")
    for table in tables:
        require_known(table, list(TABLES), "table of the experiment")
    data = _Stores.open(stores)
    split = _split(budget, patients(data.stores), seed if split_seed is None else split_seed, split_file)
    lpips = Lpips.load(lpips_weights, pick_device(device)) if lpips_weights else None
    made_from = {"budget": budget.document, "seed": seed, "store": data.fingerprint, "device": device}
    _claim(out, {**made_from, "lpips_weights_sha256": lpips.sha256 if lpips else None}, split)
    test = _TestSet(data.volumes(split.test), seed, device, lpips)
    _announce(data, split, test, budget, console)
    runs = []
    chosen = [table for table in TABLES if table in tables]
    for table, model in product(chosen, models):
        config, folder = budget.config(model, table, seed, device), out / "runs" / f"{table}_{model}"
        data.require_tile(config.model)
        console.print(f"[{table}] {model}", style="bold", markup=False)
        _train_unless_done(stores, config, folder, split, console)
        runs.append(_score_or_find(folder, table, test))
    thickness = {volume.volume_id: thickness_of(volume) for _, volume in test.volumes}
    naive = _score_naive_or_find(out, test) if "A" in chosen else []
    curves = _naive_curves_or_find(out, stores) if "A" in chosen else {}
    experiment = Experiment(budget.name, (seed,), data.fingerprint, split, tuple(runs), naive, curves, thickness, out)
    write_report(experiment, out)
    return experiment


@dataclass(frozen=True)
class _Stores:
    """The stores of an experiment, in an order that does not depend on how they were named."""

    stores: Sequence[Store]
    readers: Sequence[SuperpatchReader]

    @classmethod
    def open(cls, paths: Sequence[StorePlace]) -> _Stores:
        """Open stores; UsageError if two share a volume, which would be trained on, or scored, twice."""
        stores = sorted((Store.open(path) for path in paths), key=lambda store: store.fingerprint)
        readers, seen = [SuperpatchReader(store) for store in stores], dict[str, StorePlace]()
        for store, reader in zip(stores, readers, strict=True):
            for volume_id in reader.volumes:
                if volume_id in seen:
                    raise UsageError(
                        f"volume {volume_id} is in {seen[volume_id]} and {store.path}; give each scan once"
                    )
                seen[volume_id] = store.path
        return cls(stores, readers)

    @property
    def fingerprint(self) -> str:
        """The fingerprints of all stores, separated by commas."""
        return ",".join(store.fingerprint for store in self.stores)

    def volumes(self, groups: Sequence[str]) -> list[tuple[SuperpatchReader, Volume]]:
        """Return the volumes of some patients, each with its reader, by volume id."""
        found = [(r, volume) for r in self.readers for volume in r.volumes.values() if volume.group in groups]
        return sorted(found, key=lambda pair: pair[1].volume_id)

    def require_tile(self, model: ModelConfig) -> None:
        """Raise UsageError unless crops of the model fit the superpatches of every store."""
        for store in self.stores:
            require_tile(model, store.superpatch, store.path)


@dataclass(frozen=True)
class _TestSet:
    """What every model is scored on, and how."""

    volumes: Sequence[tuple[SuperpatchReader, Volume]]
    seed: int
    device: str
    lpips: Lpips | None

    def score(self, run: Run, predictors: Sequence[Predictor]) -> list[VolumeRow]:
        """Score all volumes by every predictor."""
        parts = [score_volumes(run, r, [v], predictors, self.seed, self.lpips) for r, v in self.volumes]
        return [row for part in parts for row in part]


def _announce(data: _Stores, split: Split, test: _TestSet, budget: ExperimentBudget, console: Console) -> None:
    console.print(
        f"{counted(len(split.train), 'patient')} to train on, {len(split.validation)} for curves, "
        f"{len(split.test)} to score ({counted(len(test.volumes), 'volume')}); budget {budget.name}, seed {test.seed}",
        highlight=False,
    )
    keys = {store.key_fingerprint for store in data.stores}
    if len(keys) > 1:
        told = f"the stores were made with {len(keys)} identity keys: a patient who is in two of them is known only"
        console.print(f"{told} where the scan is the same", highlight=False)


def _split(budget: ExperimentBudget, groups: Mapping[str, str], seed: int, split_file: Path | None) -> Split:
    """Return the split of a file, or draw one; UsageError for a file without patients for curves or for scores."""
    if split_file is None:
        return split_for(budget, groups, seed)
    split, _ = read_split(split_file, groups)
    if not (split.validation and split.test):
        raise UsageError(
            f"{split_file}: expected patients for train, validation and test, found {len(split.train)}, "
            f"{len(split.validation)} and {len(split.test)}; make it with `maesil store split`"
        )
    return split


def split_for(budget: ExperimentBudget, groups: Mapping[str, str], seed: int) -> Split:
    """Set patients aside for scores and for curves; ``groups`` as of `maesil.store.index.patients`.

    UsageError with fewer than three patients.
    """
    if (found := len(set(groups.values()))) < 3:
        raise UsageError(f"expected at least 3 patients to train, validate and score, found {found}")
    outer = split_patients(groups, float(budget.document["test"]), seed)
    rest = {group: groups[group] for group in outer.train}
    inner = split_patients(rest, float(budget.document["validation"]), seed)
    return Split(inner.train, inner.validation, outer.validation)


def _claim(out: Path, made_from: dict[str, Any], split: Split) -> None:
    """Make ``out`` the folder of this experiment, or find that it is already."""
    document = {**made_from, "split": {"train": split.train, "validation": split.validation, "test": split.test}}
    document = as_json(document)
    marker = out / "experiment.json"
    if marker.exists():
        found = read_json(marker)
        changed = [name for name in document if found.get(name) != document[name]]
        if changed:
            raise UsageError(f"{out}: holds an experiment with another {', '.join(changed)}; name another --out")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: expected a new or empty folder for the experiment, found other files")
    write_json(marker, document)


def _train_unless_done(
    stores: Sequence[StorePlace], config: RunConfig, folder: Path, split: Split, console: Console
) -> None:
    """Train a model, or go on with it, unless it is finished."""
    if not (folder / "trained").exists():
        summary = train(stores, config, folder, resume="auto", split=split, console=console)
        write_whole(folder / "trained", f"{summary.steps}\n")


def _score_or_find(folder: Path, table: PaperTable, test: _TestSet) -> Trained:
    """Score a model on the test volumes, or find the scores; and keep one crop of it for the pictures."""
    run, scores = load_run(folder, pick_device(test.device)), folder / "scores.json"
    if not scores.exists():
        predictors = model_predictors(run)
        rows = test.score(run, predictors)
        _keep_crop(folder / "crop.npz", run, predictors[0], test)
        cost = measure_cost(run.model, run.config, run.intensity)
        write_json(scores, {"scored": rows, "cost": vars(cost)}, allow_nan=True)
    found = read_json(scores)
    seconds = sum(record["seconds"] for record in read_metrics(folder / METRICS))
    with fields_of(scores):
        return Trained(table, run, _rows_of(found["scored"]), Cost(**found["cost"]), seconds, (folder,))


def _score_naive_or_find(out: Path, test: _TestSet) -> list[VolumeRow]:
    """Score the naive baselines under the masks of table A, or find the scores."""
    scores = out / "floors" / "volumes.json"
    if not scores.exists():
        run = load_run(min((out / "runs").glob("A_*")), pick_device(test.device))
        baselines = naive_baselines(run)
        rows = test.score(run, baselines)
        for baseline in baselines:
            _keep_crop(out / "floors" / f"{baseline.name}.npz", run, baseline, test)
        write_json(scores, {"scored": rows}, allow_nan=True)
    found = read_json(scores)
    with fields_of(scores):
        return _rows_of(found["scored"])


def _naive_curves_or_find(out: Path, stores: Sequence[StorePlace]) -> dict[str, float]:
    """Score the naive baselines on the crops of the learning curves of table A, or find the scores (dB)."""
    scores = out / "floors" / "crops.json"
    if not scores.exists():
        folder = min((out / "runs").glob("A_*"))
        run = load_run(folder)
        crops = validation_crops(
            Sources.open(stores, run.config.model), run.split.validation, run.config.model.crop, run.config.train
        )
        found = {one.name: psnr_of_crops(one, crops, run) for one in naive_baselines(run)} if crops else {}
        write_json(scores, {"psnr": found}, allow_nan=True)
    curves = read_json(scores)
    with fields_of(scores):
        return {name: float(psnr) for name, psnr in curves["psnr"].items()}


def _rows_of(scored: list[Any]) -> list[VolumeRow]:
    """Return rows as they were read; TypeError or AttributeError for what are none."""
    return [cast(VolumeRow, dict(row.items())) for row in scored]


def _keep_crop(path: Path, run: Run, predictor: Predictor, test: _TestSet) -> None:
    """Keep one crop of the first test volume as it was predicted, for the pictures."""
    reader, volume = test.volumes[0]
    hu = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    box = _crop_to_show(reader, volume, hu, run)
    device = next(run.model.parameters()).device
    result = reconstruct(reader, volume, predictor, run.config, test.seed, device)
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file,
            reference=hu[box],
            predicted=result.predicted[box].cpu().numpy().astype(np.float32),
            hidden=result.hidden[box].cpu().numpy(),
            spacing=np.asarray(volume.spacing),
        )


def _crop_to_show(reader: SuperpatchReader, volume: Volume, hu: HuArray, run: Run) -> tuple[slice, ...]:
    """Return the crop of the grid with the most contrast among those that lie half in the body or more."""
    crop = run.config.model.crop_zyx

    def interest(start: Zyx) -> float:
        body = float(reader.read_map_region(volume.volume_id, "body", start, crop).mean()) / 255
        return min(body, 0.5) * float(np.clip(hu[box_at(start, crop)], *run.intensity.window).std())

    return box_at(max(grid_origins(volume, crop), key=interest), crop)
