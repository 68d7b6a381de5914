"""What `maesil prove` leaves for people: sentences, tables, curves, on one page that needs no other file."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from maesil.downstream.findings import Finding
from maesil.downstream.scored import FROZEN, SCORES, SEGMENTED, SHUFFLED, Row, Rows, ScoreName, by_patient
from maesil.files import write_whole
from maesil.pages import data_url, rendered
from maesil.text import counted, printable

_COLOURS = ("#0b6e4f", "#c44900", "#1f6fb2", "#8a6d00", "#7b2d8b", "#555555")
_STYLES = ("-", "-", "--", "--", ":", ":")

_COSTS = (("steps", "step"), ("batch", "crop"), ("seeds", "seed"))

Lines = list[list[str]]
"""A table for people: its header, then its rows."""


@dataclass(frozen=True)
class Proof:
    """What a proof came to."""

    first: str
    """The encoder that is asked about."""
    rows: Rows
    findings: list[Finding]
    checks: tuple[str, ...]
    """Whether the controls score as they must."""
    limits: tuple[str, ...]
    """What may not be concluded, a sentence each."""
    notes: tuple[str, ...]
    made_from: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        told = [
            {**vars(one), "difference": vars(one.difference) if one.difference else None, "told": one.told()}
            for one in self.findings
        ]
        return {
            "made_from": self.made_from,
            "encoder": self.first,
            "findings": told,
            "checks": list(self.checks),
            "limits": list(self.limits),
            "notes": list(self.notes),
            "rows": [vars(row) for row in self.rows.rows],
        }

    def told(self) -> str:
        """Return who was learnt from, who was scored and at what cost."""
        made, budget = self.made_from, self.made_from["budget"]
        who = (
            f"Encoder {self.first}, budget {budget['name']}, part {made['part']}, seed {made['seed']}: "
            f"{counted(len(made['patients_learnt_from']), 'labelled patient')} to learn from, "
            f"{len(made['patients_scored'])} others scored."
        )
        if not budget["patients"]:
            return f"{who} No segmentation was learnt."
        steps, crops, seeds = (counted(budget[name], one) for name, one in _COSTS)
        return f"{who} Each segmentation: {steps} of {crops}, {seeds}."

    def summary(self) -> str:
        """Return the result in one line."""
        verdicts = [one.verdict for one in self.findings]
        words = {"helps": "helps", "harms": "harms", "undecided": "undecided", "too few": "too few patients"}
        counts = ", ".join(f"{told} in {verdicts.count(one)}" for one, told in words.items())
        return f"{counted(len(verdicts), 'comparison')}: {counts}"

    def frozen_table(self) -> Lines:
        """Return what frozen encoders score, a line each, beside how far the encoder lies above it."""
        shown = [score for score in FROZEN if self.rows.encoders([score])]
        names = sorted(self.rows.encoders(FROZEN), key=lambda name: (name == SHUFFLED, name != self.first))
        lines = [["encoder", *(cell for score in shown for cell in (SCORES[score], f"{self.first} minus this"))]]
        return lines + [[name, *self._cells(shown, self.first, name)] for name in names]

    def segmentation_table(self) -> Lines:
        """Return what segmentations score, by patients learnt from and start."""
        shown = [score for score in SEGMENTED if self.rows.encoders([score])]
        names = self.rows.encoders(SEGMENTED)
        header = [
            "patients",
            "start",
            *(cell for score in shown for cell in (self._title(score), f"{self.first} minus this")),
        ]
        return [header] + [
            [str(shots), name, *self._cells(shown, self.first, name, shots)]
            for shots in self.rows.shots()
            for name in names
        ]

    def organ_table(self) -> Lines:
        """Return the Dice of each organ, learnt from all patients: mean over patients and seeds."""
        names, shots = self.rows.encoders(["dice"]), max(self.rows.shots(), default=0)
        organs = sorted({row.organ for row in self.rows.rows if row.score == "dice"})
        lines = [["organ", "patients scored", *names]]
        for organ in organs:
            of_starts = [by_patient(r for r in self.rows.of("dice", name, shots) if r.organ == organ) for name in names]
            means = [f"{np.mean(list(one.values())):.3f}" if one else "-" for one in of_starts]
            lines.append([organ, str(max(map(len, of_starts), default=0)), *means])
        return lines

    def tables(self) -> list[tuple[str, Lines]]:
        """Return all tables with their titles, those without a row left out."""
        shots = max(self.rows.shots(), default=0)
        titled = [
            ("Frozen encoders", self.frozen_table()),
            ("Segmentation", self.segmentation_table()),
            (f"Dice by organ, learnt from {counted(shots, 'patient')}", self.organ_table()),
        ]
        return [(title, lines) for title, lines in titled if len(lines) > 1]

    def shown(self) -> Iterable[Any]:
        """Yield what a terminal shows."""
        for title, (heads, *rows) in self.tables():
            table = Table(title=title, title_justify="left")
            for number, head in enumerate(heads):
                table.add_column(printable(head), justify="right" if number else "left")
            for row in rows:
                table.add_row(*map(printable, row))
            yield table
        yield from (one.told() for one in self.findings)
        yield from (*self.checks, *self.limits, *self.notes)

    def _title(self, score: ScoreName) -> str:
        return (
            f"{SCORES[score]} at {self.made_from['budget']['tolerance_mm']:g} mm"
            if score == "surface_dice"
            else SCORES[score]
        )

    def _cells(self, shown: Sequence[ScoreName], first: str, name: str, shots: int = 0) -> Iterable[str]:
        for score in shown:
            mean = self.rows.mean(score, name, shots)
            yield "-" if mean is None else f"{mean:.3f}"
            found = None if name == first else self.rows.difference(score, first, name, shots)
            yield "" if found is None else f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def write_page(proof: Proof, out: Path) -> None:
    """Write ``index.html``; every name in it is escaped."""
    tables = []
    for title, (heads, *rows) in proof.tables():
        named = [(printable(head), head not in ("encoder", "start", "organ")) for head in heads]
        tables.append((title, named, [[printable(cell) for cell in row] for row in rows]))
    curves = _curves(proof.rows)
    page = rendered(
        "prove.html",
        told=proof.told(),
        summary=proof.summary(),
        findings=[(one.verdict, printable(one.told())) for one in proof.findings],
        checks=proof.checks,
        limits=proof.limits,
        notes=[printable(note) for note in proof.notes],
        tables=tables,
        curves=data_url("image/png", curves) if curves else "",
    )
    write_whole(out / "index.html", page)


def _curves(rows: Rows) -> bytes:
    """Draw the Dice against steps, one panel for each number of patients; nothing where nothing was learnt."""
    shots = rows.shots()
    if not shots:
        return b""
    figure = Figure(figsize=(4.4 * len(shots), 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, number in zip(figure.subplots(1, len(shots), sharey=True, squeeze=False)[0], shots, strict=True):
        for place, name in enumerate(rows.encoders(["dice"])):
            steps, means = _curve([r for r in rows.rows if (r.score, r.encoder, r.shots) == ("dice", name, number)])
            colour, style = _COLOURS[place % len(_COLOURS)], _STYLES[place % len(_STYLES)]
            label = printable(name).replace("$", r"\$")
            axes.plot(steps, means, style, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
        axes.set(title=f"learnt from {counted(number, 'patient')}", xlabel="steps")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Dice, mean over patients and seeds")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _curve(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    steps = sorted({row.step for row in rows})
    means = [float(np.mean(list(by_patient(r for r in rows if r.step == step).values()))) for step in steps]
    return steps, means
