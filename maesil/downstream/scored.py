"""What every part of `maesil prove` leaves: scores of one patient each. Means are taken over patients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from maesil.evaluation.intervals import Difference, paired_difference

ScoreName = Literal["share_r2", "presence_auroc", "retrieval", "other_scan", "dice", "surface_dice"]
SCORES: dict[ScoreName, str] = {
    "share_r2": "organ share of a patch (R2)",
    "presence_auroc": "organ presence in a crop (AUROC)",
    "retrieval": "organs of the most similar crop (overlap)",
    "other_scan": "the patient's other scan is the most similar (share)",
    "dice": "Dice",
    "surface_dice": "surface Dice",
}
"""Higher is better, and 1 is the most, for all of them."""
FROZEN: tuple[ScoreName, ...] = ("share_r2", "presence_auroc", "retrieval", "other_scan")
SEGMENTED: tuple[ScoreName, ...] = ("dice", "surface_dice")
SHUFFLED = "shuffled labels"
"""The run's own encoder, taught with labels of other places: it must score at chance."""
EVERYWHERE = "organ everywhere"
"""Every voxel called the organ: the Dice that chance reaches at most (`maesil.downstream.few_shot`)."""


@dataclass(frozen=True)
class Row:
    """How well an encoder does on one patient."""

    score: ScoreName
    encoder: str
    patient: str
    value: float
    organ: str = ""
    shots: int = 0
    """Patients that a segmentation was learnt from; 0 for what is asked of frozen encoders."""
    seed: int = 0
    step: int = 0
    """Steps of learning done."""


@dataclass(frozen=True)
class Rows:
    """Many of them."""

    rows: Sequence[Row]

    def of(self, score: ScoreName, encoder: str, shots: int = 0) -> list[Row]:
        """Return the rows of an encoder at its last step."""
        found = [row for row in self.rows if (row.score, row.encoder, row.shots) == (score, encoder, shots)]
        last = max((row.step for row in found), default=0)
        return [row for row in found if row.step == last]

    def encoders(self, scores: Iterable[ScoreName]) -> list[str]:
        """Return the encoders that have any of some scores, in the order in which they were scored."""
        wanted = set(scores)
        return list(dict.fromkeys(row.encoder for row in self.rows if row.score in wanted))

    def shots(self) -> list[int]:
        """Return the numbers of patients that segmentations were learnt from, ascending."""
        return sorted({row.shots for row in self.rows if row.shots})

    def mean(self, score: ScoreName, encoder: str, shots: int = 0) -> float | None:
        """Return the mean over patients; None where nothing could be scored."""
        return _mean(list(by_patient(self.of(score, encoder, shots)).values()))

    def difference(self, score: ScoreName, ours: str, theirs: str, shots: int = 0) -> Difference | None:
        """Return how far one encoder lies above another on the same patients; None for fewer than two patients."""
        return paired_difference(by_patient(self.of(score, ours, shots)), by_patient(self.of(score, theirs, shots)))


def by_patient(rows: Iterable[Row]) -> dict[str, float]:
    """Return the score of each patient: the mean over seeds of each organ, then over organs."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        values.setdefault(row.patient, {}).setdefault(row.organ, []).append(row.value)
    return {
        patient: float(np.mean([np.mean(of_organ) for of_organ in organs.values()]))
        for patient, organs in values.items()
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
