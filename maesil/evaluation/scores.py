"""Rows of scores: what a row holds, how the rows of volumes become the rows of a table, and the table itself.

The protocol is told in ``docs/explanation/metrics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.text import counted
from maesil.training.checkpoint import Run

REGIONS = ("body", "whole")

ERROR_SCORES = ("psnr_hidden", "psnr_whole", "psnr_pasted", "mae_hu")

ENCODER_SCORES = ("encoder_gain_db", "encoder_gain_shuffled_db", "effective_rank")
"""What the encoder is worth, of models alone (`maesil.evaluation.encoder_use`)."""


class Shown(NamedTuple):
    """How a score is shown to people."""

    header: str
    decimals: int
    in_db: bool = False

    @property
    def title(self) -> str:
        """The header with its unit, for tables whose caption does not say it."""
        return f"{self.header} (dB)" if self.in_db else self.header


SCORES = {
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

Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What an evaluation found; ``rows`` are those of ``docs/explanation/metrics.md``."""

    facts: dict[str, Any]
    rows: list[Row]
    rows_other: list[Row]
    per_volume: list[Row]
    pictures: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        scored = [row for row in self.rows if row["psnr_hidden"] is not None]
        shown = [f"{row['region']} {row['model']} {row['psnr_hidden']:.2f} dB" for row in scored]
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
            if (one["model"], one["region"]) == (row["model"], row["region"]) and one["psnr_hidden"] is not None:
                per_patient.setdefault(one["group"], []).append(one["psnr_hidden"])
        means = [float(np.mean(values)) for values in per_patient.values()]
        return f" ± {np.std(means, ddof=1):.2f}" if len(means) > 1 else ""


def table_of(run: Run) -> Row:
    """Return which comparison a run belongs to: A, inpainting of a masked input, or B, reconstruction of a full one."""
    full = run.config.mask.kind == "none"
    return {"table": "B", "input": "full"} if full else {"table": "A", "input": "masked"}


def summarise(
    run_dir: Path,
    run: Run,
    store: Store,
    volumes: list[Volume],
    seed: int,
    scored: list[Row],
    pictures: list[Path],
    trained_on: Set[str] = frozenset(),
) -> Report:
    """Average the volumes' scores into rows; ``trained_on`` are the patient groups that the run was trained on."""
    facts = {
        "run": str(run_dir),
        "step": run.step,
        "store_fingerprint": store.fingerprint,
        "seed": seed,
        "window": list(run.intensity.window),
        "mask": run.config.mask.kind,
    }
    common = {**table_of(run), "mask": facts["mask"], "seed": seed, "window": facts["window"]}
    of_volumes = [row for row in scored if "group_by" not in row]
    rows = mean_rows(of_volumes, ("region", "model"), common)

    in_groups = [row for row in scored if "group_by" in row]
    in_groups += in_thickness_groups(scored, {volume.volume_id: thickness_of(volume) for volume in volumes})
    others = mean_rows(in_groups, ("group_by", "group_name", "region", "model"), common)

    trained = sum(volume.group in trained_on for volume in volumes)
    some = f"{trained} of {counted(len(volumes), 'volume')}"
    note = f"the run was trained on the patients of {some}: no measure of new patients."
    per_volume = [{name: plain(value) for name, value in row.items()} for row in of_volumes]
    return Report(facts, rows, others, per_volume, tuple(pictures), (note,) if trained else ())


def in_thickness_groups(scored: Iterable[Row], thickness: dict[str, str]) -> list[Row]:
    """Return the rows of whole volumes once more, each in the thickness group of its volume."""
    return [
        {**row, "group_by": "slice_thickness", "group_name": thickness[row["volume_id"]]}
        for row in scored
        if "group_by" not in row
    ]


def mean_rows(scored: Iterable[Row], keys: tuple[str, ...], common: Row) -> list[Row]:
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
        values = [row[name] for row in rows if _is_number(row.get(name))]
        means[name] = plain(float(np.mean(values))) if values else None
    return {**means, "volumes": sum(_is_number(row["psnr_whole"]) for row in rows)}


def thickness_of(volume: Volume) -> str:
    """Return the thickness group of a volume."""
    return next(name for name, (above, up_to) in THICKNESS.items() if above < volume.source_spacing[0] <= up_to)


def _is_number(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def plain(value: Any) -> Any:
    """Return None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number_told(value: float | None, decimals: int) -> str:
    """Return a number for people, a dash for none."""
    return "-" if value is None else f"{value:.{decimals}f}"
