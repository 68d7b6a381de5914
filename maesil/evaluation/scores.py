"""Rows of scores: what a row holds, how the rows of volumes become the rows of a table, and the table itself.

The protocol is told in ``docs/explanation/metrics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
from rich.table import Table

from maesil.evaluation.metrics import Region
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.text import counted
from maesil.training.checkpoint import Run

PaperTable = Literal["A", "B"]
"""A: inpainting of a masked input. B: reconstruction of a full one."""

Psnr = Literal["psnr_hidden", "psnr_whole", "psnr_pasted"]
ScoreName = Literal[
    Psnr, "ssim_3d", "ssim_axial", "lpips", "mae_hu", "border_ratio",
    "encoder_gain_db", "encoder_gain_shuffled_db", "effective_rank",
]  # fmt: skip


class Shown(NamedTuple):
    """How a score is shown to people."""

    header: str
    decimals: int
    in_db: bool = False

    @property
    def title(self) -> str:
        """The header with its unit, for tables whose caption does not say it."""
        return f"{self.header} (dB)" if self.in_db else self.header


SCORES: dict[ScoreName, Shown] = {
    "psnr_hidden": Shown("PSNR hidden", 2, in_db=True), "psnr_whole": Shown("PSNR whole", 2, in_db=True),
    "psnr_pasted": Shown("PSNR pasted", 2, in_db=True), "ssim_3d": Shown("SSIM 3D", 3),
    "ssim_axial": Shown("SSIM axial", 3), "lpips": Shown("LPIPS", 3), "mae_hu": Shown("MAE (HU)", 1),
    "border_ratio": Shown("border ratio", 2), "encoder_gain_db": Shown("encoder gain", 2, in_db=True),
    "encoder_gain_shuffled_db": Shown("shuffled", 2, in_db=True), "effective_rank": Shown("latent rank", 1),
}  # fmt: skip
"""The scores of a row, in order. No other module lists them."""

HU_CLASSES = {"lung": (-1024, -500), "fat": (-150, -30), "soft": (-30, 150), "bone": (150, 3072)}
"""Reference HU from .. below (ours); the rest, mostly partial volume between lung and fat, is in no class."""

THICKNESS = {"<= 2 mm": (0.0, 2.0), "2-3.5 mm": (2.0, 3.5), "> 3.5 mm": (3.5, math.inf)}
"""Native distance between slices: above .. up to and including (mm)."""


class Scores(TypedDict, total=False):
    """The scores of a row; one that does not apply is missing, NaN or None."""

    psnr_hidden: float | None
    psnr_whole: float | None
    psnr_pasted: float | None
    ssim_3d: float | None
    ssim_axial: float | None
    lpips: float | None
    mae_hu: float | None
    border_ratio: float | None
    encoder_gain_db: float | None
    """What the encoder is worth, as the two that follow; of models alone (`maesil.evaluation.encoder_use`)."""
    encoder_gain_shuffled_db: float | None
    effective_rank: float | None


class RegionScores(Scores):
    """The scores of one predicted volume, within one region or within a group of its voxels."""

    region: Region
    group_by: NotRequired[str]
    """What the voxels or volumes were grouped by: ``hu_class``, ``column`` or ``slice_thickness``."""
    group_name: NotRequired[str]
    seam_ratio: NotRequired[float | None]
    """The border ratio of the borders between crops alone."""
    patch_rmse_hu: NotRequired[list[float] | None]
    """10th, 50th and 90th percentile over the patches (HU)."""


class VolumeRow(RegionScores):
    """One volume as one model predicted it."""

    model: str
    volume_id: str
    group: str
    """Its patient group."""


class Comparison(TypedDict):
    """What rows must have in common to be compared."""

    table: PaperTable
    input: Literal["masked", "full"]
    mask: str
    seed: int
    window: list[float]
    """HU."""
    parameters: NotRequired[int]
    """What the model costs, as the three that follow; of the paper's experiment alone."""
    gflop: NotRequired[float]
    latent_per_voxel: NotRequired[float]
    steps: NotRequired[int]


class Row(Comparison, Scores):
    """The mean over the volumes of one model and region, or of a group of them."""

    region: Region
    model: str
    group_by: NotRequired[str]
    group_name: NotRequired[str]
    volumes: int


class Facts(TypedDict):
    """What an evaluation was made of."""

    run: str
    step: int
    store_fingerprint: str
    seed: int
    window: list[float]
    mask: str
    weights_sha256: NotRequired[str]
    lpips_weights_sha256: NotRequired[str]


@dataclass(frozen=True)
class Report:
    """What an evaluation found; ``rows`` are those of ``docs/explanation/metrics.md``."""

    facts: Facts
    rows: list[Row]
    rows_other: list[Row]
    per_volume: list[VolumeRow]
    pictures: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        scored = [(row, psnr) for row in self.rows if (psnr := row["psnr_hidden"]) is not None]
        shown = [f"{row['region']} {row['model']} {psnr:.2f} dB" for row, psnr in scored]
        return f"Report({self.facts['run']}, step {self.facts['step']}: {'; '.join(shown)})"

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
            f"{self.facts['run']}, step {self.facts['step']}: {counted(volumes, 'volume')}, "
            f"window {lo_hi[0]:g} to {lo_hi[1]:g} HU, {self.facts['mask']} mask, seed {self.facts['seed']}"
        )
        caption = "\n".join(("PSNR in dB, mean over volumes, ± over patients.", *self.notes))
        table = Table(title=title, caption=caption, caption_justify="left")
        table.add_column("region")
        table.add_column("model")
        with_lpips = any(row["lpips"] is not None for row in self.rows)  # only where it was asked for
        columns = {name: shown for name, shown in SCORES.items() if name != "lpips" or with_lpips}
        for shown in columns.values():
            table.add_column(shown.header, justify="right")
        for row in self.rows:
            cells = [number_told(row[name], shown.decimals) for name, shown in columns.items()]
            cells[0] += self._spread(row)
            table.add_row(row["region"], row["model"], *cells, end_section=row["model"] == "interpolation")
        return table

    def _spread(self, row: Row) -> str:
        per_patient: dict[str, list[float]] = {}
        for one in self.per_volume:
            same = (one["model"], one["region"]) == (row["model"], row["region"])
            if same and (psnr := one["psnr_hidden"]) is not None:
                per_patient.setdefault(one["group"], []).append(psnr)
        means = [float(np.mean(values)) for values in per_patient.values()]
        return f" ± {np.std(means, ddof=1):.2f}" if len(means) > 1 else ""


def comparison_of(run: Run, seed: int) -> Comparison:
    """Return what the rows of a run can be compared by: table B where it was given the full input, else A."""
    mask, window = run.config.mask.kind, list(run.intensity.window)
    if mask == "none":
        return {"table": "B", "input": "full", "mask": mask, "seed": seed, "window": window}
    return {"table": "A", "input": "masked", "mask": mask, "seed": seed, "window": window}


def summarise(
    run_dir: Path,
    run: Run,
    store: Store,
    volumes: list[Volume],
    seed: int,
    scored: list[VolumeRow],
    pictures: list[Path],
    trained_on: Set[str] = frozenset(),
) -> Report:
    """Average the volumes' scores into rows; ``trained_on`` are the patient groups that the run was trained on."""
    facts: Facts = {
        "run": str(run_dir),
        "step": run.step,
        "store_fingerprint": store.fingerprint,
        "seed": seed,
        "window": list(run.intensity.window),
        "mask": run.config.mask.kind,
    }
    common = comparison_of(run, seed)
    of_volumes = [row for row in scored if "group_by" not in row]
    rows = mean_rows(of_volumes, ("region", "model"), common)

    in_groups = [row for row in scored if "group_by" in row]
    in_groups += in_thickness_groups(scored, {volume.volume_id: thickness_of(volume) for volume in volumes})
    others = mean_rows(in_groups, ("group_by", "group_name", "region", "model"), common)

    trained = sum(volume.group in trained_on for volume in volumes)
    some = f"{trained} of {counted(len(volumes), 'volume')}"
    note = f"the run was trained on the patients of {some}: no measure of new patients."
    per_volume = [as_json_has_it(row) for row in of_volumes]
    return Report(facts, rows, others, per_volume, tuple(pictures), (note,) if trained else ())


def in_thickness_groups(scored: Iterable[VolumeRow], thickness: dict[str, str]) -> list[VolumeRow]:
    """Return the rows of whole volumes once more, each in the thickness group of its volume."""
    return [
        {**row, "group_by": "slice_thickness", "group_name": thickness[row["volume_id"]]}
        for row in scored
        if "group_by" not in row
    ]


def mean_rows(scored: Iterable[VolumeRow], keys: tuple[Key, ...], common: Comparison) -> list[Row]:
    """Average the volumes' rows that agree in ``keys``; models stay in the order they were scored in."""
    groups: dict[tuple[str, ...], list[VolumeRow]] = {}
    for row in scored:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: item[0][:-1])
    return [
        cast(Row, {**dict(zip(keys, values, strict=True)), **common, **_mean_scores(rows), "volumes": _whole(rows)})
        for values, rows in ordered
    ]


Key = Literal["group_by", "group_name", "region", "model"]
"""What rows are averaged by."""


def _mean_scores(rows: list[VolumeRow]) -> Scores:
    """Average each score over the volumes that have it: None where none has, or where it is infinite."""
    means: Scores = {}
    for name in SCORES:
        values = [value for row in rows if (value := row.get(name)) is not None and not math.isnan(value)]
        means[name] = plain(float(np.mean(values))) if values else None
    return means


def _whole(rows: list[VolumeRow]) -> int:
    """Return how many volumes have any voxel to score."""
    return sum((psnr := row["psnr_whole"]) is not None and not math.isnan(psnr) for row in rows)


def thickness_of(volume: Volume) -> str:
    """Return the thickness group of a volume."""
    return next(name for name, (above, up_to) in THICKNESS.items() if above < volume.source_spacing[0] <= up_to)


def as_json_has_it(row: VolumeRow) -> VolumeRow:
    """Return a row with None for the numbers that JSON has no word for."""
    return cast(VolumeRow, {name: plain(value) for name, value in row.items()})


def plain(value: Any) -> Any:
    """Return None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number_told(value: float | None, decimals: int) -> str:
    """Return a number for people, a dash for none."""
    return "-" if value is None else f"{value:.{decimals}f}"
