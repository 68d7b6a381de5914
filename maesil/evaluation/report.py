"""What the experiment leaves for people: tables (Markdown, JSON, CSV), curves, pictures, one page with all of them."""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from maesil.data.split import Split
from maesil.documents import write_json
from maesil.errors import DamagedError
from maesil.evaluation.cost import Cost
from maesil.evaluation.encoder_use import warning_of_unused_encoders
from maesil.evaluation.intervals import Difference, paired_difference
from maesil.evaluation.metrics import Region
from maesil.evaluation.scores import (
    SCORES,
    Comparison,
    PaperTable,
    Psnr,
    Row,
    ScoreName,
    VolumeRow,
    comparison_of,
    in_thickness_groups,
    mean_rows,
    number_told,
)
from maesil.files import write_whole
from maesil.pages import data_url, rendered
from maesil.pictures import save_comparison
from maesil.text import counted
from maesil.training.checkpoint import Run
from maesil.training.log import METRICS, read_metrics

NAMES = {
    "maesil": "MAESIL",
    "maesil_tokens": "MAESIL, tokens alone",
    "ae": "AE",
    "vae": "VAE",
    "vqvae": "VQ-VAE",
    "mae2d": "2D MAE",
    "interpolation": "interpolation (naive)",
    "mean": "mean (naive)",
}

TITLES: dict[PaperTable, str] = {
    "A": "Table A, inpainting: the masked input, scored where it was hidden",
    "B": "Table B, reconstruction: the full input, scored everywhere",
}

_PSNR: dict[PaperTable, tuple[Psnr, ...]] = {"A": ("psnr_hidden", "psnr_pasted"), "B": ("psnr_whole",)}
"""The PSNR of each table; the first one orders it. All other scores are of both."""
_COLOURS = ("#0b6e4f", "#c44900", "#7b2d8b", "#1f6fb2", "#8a6d00")


@dataclass(frozen=True)
class Trained:
    """One model of one table."""

    table: PaperTable
    run: Run
    scored: list[VolumeRow]
    """Rows of its volumes, see `maesil.evaluation.evaluate.score_volume`."""
    cost: Cost
    seconds: float
    """Wall-clock of its training steps."""
    folders: tuple[Path, ...]
    """Its run folder, one per seed."""

    @property
    def model(self) -> str:
        """Its kind."""
        return self.run.config.model.kind


@dataclass(frozen=True)
class Experiment:
    """All that was trained and scored."""

    budget: str
    seeds: tuple[int, ...]
    store_fingerprint: str
    split: Split
    runs: tuple[Trained, ...]
    naive: list[VolumeRow]
    """Rows of the naive baselines' volumes, under the masks of table A."""
    naive_curves: dict[str, float]
    """What the naive baselines score on the crops of the learning curves (dB), by name."""
    thickness: dict[str, str]
    """The thickness group of each scored volume."""
    folder: Path
    """Where the first seed keeps the crops of its naive baselines."""
    of_seeds: tuple[list[Row], ...] = ()
    """The rows of each seed, where there are several; all other scores are means over the seeds."""

    @property
    def seed(self) -> int:
        """The first seed; bootstraps draw with it."""
        return self.seeds[0]

    @property
    def tables(self) -> list[PaperTable]:
        """The tables that models were trained for."""
        return [table for table in TITLES if any(one.table == table for one in self.runs)]

    def rows(self) -> list[Row]:
        """Return the rows of both tables, as `maesil evaluate --json` writes them, and what each model costs."""
        rows = []
        for of_volumes, common in self._parts():
            rows += mean_rows([row for row in of_volumes if "group_by" not in row], ("region", "model"), common)
        return rows

    def rows_other(self) -> list[Row]:
        """Return the rows by HU class, column and slice thickness."""
        rows = []
        for of_volumes, common in self._parts():
            grouped = [row for row in of_volumes if "group_by" in row]
            grouped += in_thickness_groups(of_volumes, self.thickness)
            rows += mean_rows(grouped, ("group_by", "group_name", "region", "model"), common)
        return rows

    def _parts(self) -> Iterable[tuple[list[VolumeRow], Comparison]]:
        """Yield the rows of the volumes, one model after another, with what they have in common."""
        for one in self.runs:
            yield (
                one.scored,
                {
                    **comparison_of(one.run, self.seed),
                    "parameters": one.cost.parameters,
                    "gflop": one.cost.gflop,
                    "latent_per_voxel": one.cost.latent_per_voxel,
                    "steps": one.run.step,
                },
            )
        if self.naive:
            yield self.naive, comparison_of(next(one.run for one in self.runs if one.table == "A"), self.seed)

    def spread(self, row: Row, score: ScoreName) -> float | None:
        """Return the standard deviation of a row's score over patients; None for fewer than two."""
        means = list(self._by_patient(row["table"], row["model"], row["region"], score).values())
        return float(np.std(means, ddof=1)) if len(means) > 1 else None

    def spread_of_seeds(self, row: Row, score: ScoreName) -> float | None:
        """Return the standard deviation of a row's score over seeds; None for one seed."""
        names: tuple[Literal["table", "model", "region"], ...] = ("table", "model", "region")
        same = [one for rows in self.of_seeds for one in rows if all(one[name] == row[name] for name in names)]
        values = [value for one in same if (value := one[score]) is not None]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def difference(self, row: Row, score: ScoreName) -> Difference | None:
        """Return how far MAESIL lies above a row of the same table, over the patients of both."""
        ours, theirs = (
            self._by_patient(row["table"], model, row["region"], score) for model in ("maesil", row["model"])
        )
        return paired_difference(ours, theirs, self.seed)

    def _by_patient(self, table: PaperTable, model: str, region: Region, score: ScoreName) -> dict[str, float]:
        """Return a model's score of each patient, the mean over the patient's volumes."""
        scored = [r for part, common in self._parts() if common["table"] == table for r in part]
        values: dict[str, list[float]] = {}
        for one in scored:
            same = (one["model"], one["region"]) == (model, region) and "group_by" not in one
            if same and (value := one[score]) is not None:
                values.setdefault(one["group"], []).append(value)
        return {patient: float(np.mean(of_patient)) for patient, of_patient in values.items()}


def write_report(experiment: Experiment, out: Path) -> None:
    """Write ``results.json``, ``results.csv``, ``tables.md``, ``curves.png``, pictures and ``index.html`` to ``out``.

    All but the seconds and the curves' time axis are the same for the same seed, store and budget.
    """
    rows = experiment.rows()
    write_json(out / "results.json", _document(experiment, rows))
    write_whole(out / "results.csv", _csv(rows))
    tables = {table: _table(experiment, rows, table) for table in experiment.tables}
    write_whole(out / "tables.md", _markdown(experiment, tables))
    _draw_curves(experiment, out / "curves.png")
    pictures = [path for table in tables if (path := _draw_comparison(experiment, out, table))]
    write_whole(out / "index.html", _page(experiment, tables, [out / "curves.png", *pictures]))


def _document(experiment: Experiment, rows: list[Row]) -> dict[str, Any]:
    return {
        "rows": rows,
        "rows_other": experiment.rows_other(),
        "budget": experiment.budget,
        "seed": experiment.seed,
        "seeds": list(experiment.seeds),
        "rows_of_seeds": list(experiment.of_seeds),
        "store_fingerprint": experiment.store_fingerprint,
        "patients": {name: len(groups) for name, groups in vars(experiment.split).items()},
        "seconds": {f"{one.table}_{one.model}": round(one.seconds, 1) for one in experiment.runs},
    }


def _csv(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _table(experiment: Experiment, rows: Sequence[Row], table: PaperTable) -> list[list[str]]:
    """Return a table for people, the region `body`, best first: header, then a row a model."""
    shown: list[ScoreName] = [*_PSNR[table], *(name for name in SCORES if not name.startswith("psnr_"))]
    first = shown[0]
    lines = [
        [
            "model",
            *(SCORES[name].title for name in shown),
            "MAESIL minus this (dB, 95 %)",
            "M parameters",
            "GFLOP",
            "code numbers per voxel",
            "steps",
            "seconds",
        ]
    ]
    chosen = [row for row in rows if row["table"] == table and row["region"] == "body"]
    for row in sorted(chosen, key=lambda row: -(row[first] or 0)):
        cells = [number_told(row[name], SCORES[name].decimals) for name in shown]
        spread = experiment.spread(row, first)
        cells[0] += f" ± {spread:.2f}" if spread is not None else ""
        of_seeds = experiment.spread_of_seeds(row, first)
        cells[0] += f" (seeds ± {of_seeds:.2f})" if of_seeds is not None else ""
        lines.append([NAMES[row["model"]], *cells, _difference(experiment, row, first), *_costs(experiment, row)])
    return lines


def _difference(experiment: Experiment, row: Row, score: ScoreName) -> str:
    found = None if row["model"] == "maesil" else experiment.difference(row, score)
    return "-" if found is None else f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def _costs(experiment: Experiment, row: Row) -> list[str]:
    for one in experiment.runs:
        if (one.table, one.model) == (row["table"], row["model"]):
            cost = one.cost
            numbers = (f"{cost.parameters / 1e6:.2f}", f"{cost.gflop:.2f}", f"{cost.latent_per_voxel:.4f}")
            return [*numbers, str(one.run.step), f"{one.seconds:.0f}"]
    return ["-"] * 5


def _told(experiment: Experiment) -> str:
    split, run = experiment.split, experiment.runs[0].run
    lo, hi = run.intensity.window
    volumes = len(experiment.thickness)
    return (
        f"Budget {experiment.budget}, {_seeds_told(experiment.seeds)}. "
        f"Scored: {counted(volumes, 'volume')} of patients that no model was trained on or validated on "
        f"(patient groups: {len(split.train)} trained on, {len(split.validation)} for the curves, "
        f"{len(split.test)} scored). "
        f"Window {lo:g} to {hi:g} HU, region body (the patient's valid voxels). "
        "PSNR: squared error pooled over each volume, mean over volumes in dB, ± over patients. SSIM of table A is "
        "taken with the visible voxels pasted in. Encoder gain: what the score loses when each token becomes the mean "
        "over its crop, and when the tokens are shuffled; latent rank: directions that the tokens fill."
    )


def _seeds_told(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"means of the seeds {', '.join(map(str, seeds))}"


def _markdown(experiment: Experiment, tables: dict[PaperTable, list[list[str]]]) -> str:
    parts = [_told(experiment), *warning_of_unused_encoders(experiment.rows())]
    for table, lines in tables.items():
        rows = ["| " + " | ".join(line) + " |" for line in lines]
        rows.insert(1, "|" + " --- |" * len(lines[0]))
        parts.append(f"## {TITLES[table]}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _draw_curves(experiment: Experiment, path: Path) -> None:
    """Draw the PSNR on the validation patients' crops against training time, one panel per table.

    The naive baselines are lines: where a curve crosses one, learning has passed it.
    """
    figure = Figure(figsize=(5 * len(experiment.tables), 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(experiment.tables), squeeze=False)[0]
    for axes, table in zip(panels, experiment.tables, strict=True):
        runs = [one for one in experiment.runs if one.table == table]
        for one, colour in zip(runs, _COLOURS, strict=False):
            for number, folder in enumerate(one.folders):
                minutes, scores = _curve(folder)
                if scores:
                    label = NAMES[one.model] if number == 0 else None
                    axes.plot(minutes, scores, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
        if table == "A":
            for (name, score), style in zip(experiment.naive_curves.items(), ("--", ":"), strict=False):
                axes.axhline(score, color="#555555", linestyle=style, linewidth=1.2, label=NAMES[name])
        axes.set(title=TITLES[table].partition(":")[0], xlabel="minutes of training", ylabel="PSNR, validation (dB)")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    figure.savefig(path, format="png", metadata={"Software": None})


def _curve(folder: Path) -> tuple[list[float], list[float]]:
    """Return when a run was validated (minutes of training) and what it scored (dB)."""
    records = read_metrics(folder / METRICS)
    minutes = np.cumsum([record["seconds"] for record in records]) / 60
    points = [
        (float(at), float(record["validation_psnr"]))
        for at, record in zip(minutes, records, strict=True)
        if "validation_psnr" in record
    ]
    return [at for at, _ in points], [score for _, score in points]


def _draw_comparison(experiment: Experiment, out: Path, table: PaperTable) -> Path | None:
    """Draw one crop of a test volume as every model of a table reconstructs it."""
    sources = {NAMES[one.model]: one.folders[0] / "crop.npz" for one in experiment.runs if one.table == table}
    if table == "A":
        sources |= {
            NAMES[name].partition(" (")[0]: experiment.folder / "floors" / f"{name}.npz"
            for name in ("interpolation", "mean")
        }
    crops = {name: _kept_crop(path) for name, path in sources.items() if path.exists()}
    if not crops:
        return None
    first = next(iter(crops.values()))
    path = out / f"reconstructions_{table}.png"
    spacing = tuple(float(mm) for mm in first["spacing"])
    save_comparison(
        path,
        first["reference"],
        first["hidden"],
        {name: crop["predicted"] for name, crop in crops.items()},
        experiment.runs[0].run.intensity.window,
        TITLES[table].partition(":")[0],
        (spacing[0], spacing[1], spacing[2]),
    )
    return path


def _kept_crop(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a crop that was kept for the pictures; DamagedError."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in ("reference", "predicted", "hidden", "spacing")}
    except (ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        told = "expected a crop kept for the pictures, found it damaged; remove its folder and run the same command"
        raise DamagedError(f"{path}: {told}") from error


def _page(experiment: Experiment, tables: dict[PaperTable, list[list[str]]], pictures: Sequence[Path]) -> str:
    """Return a page that needs no other file."""
    return rendered(
        "experiment.html",
        told=_told(experiment),
        warnings=list(warning_of_unused_encoders(experiment.rows())),
        tables=[
            (TITLES[table], [(head, number > 0) for number, head in enumerate(heads)], rows)
            for table, (heads, *rows) in tables.items()
        ],
        pictures=[(path.stem, data_url("image/png", path.read_bytes())) for path in pictures],
    )
