"""How sure a difference between two models is: the bootstrap over the patients that both were scored on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """The mean difference of two models' scores, and the interval that holds it 95 times of 100."""

    mean: float
    low: float
    high: float
    patients: int


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float], seed: int = 0) -> Difference | None:
    """Return how far ``ours`` lies above ``theirs``, scores by patient; None for fewer than two common patients.

    Patients are drawn with replacement, each with the scores of both models, so what makes a patient hard for all
    models cancels out (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: percentiles).
    """
    common = sorted(ours.keys() & theirs.keys())
    if len(common) < 2:
        return None
    differences = np.array([ours[patient] - theirs[patient] for patient in common])
    drawn = np.random.default_rng(seed).integers(len(common), size=(RESAMPLES, len(common)))
    low, high = np.percentile(differences[drawn].mean(axis=1), [2.5, 97.5])
    return Difference(float(differences.mean()), float(low), float(high), len(common))
