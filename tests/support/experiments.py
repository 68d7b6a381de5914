"""The paper's experiment with models so small that a test may train them all."""

from __future__ import annotations

from collections.abc import Sequence

from maesil.evaluation.experiment import ExperimentBudget

SMALL = {"crop": 32, "width": 16, "depth": 1, "decoder_width": 16, "channels": 4, "latent": 8, "codes": 8}


def small_budget(models: Sequence[str], steps: int, test: float) -> ExperimentBudget:
    """Return a budget of a few steps for some models; ``test`` is the share of the patients that are scored."""
    document = {
        "preset": "tiny",
        "test": test,
        "validation": 0.3,
        "all": {"model": SMALL, "train": {"batch": 2, "validate_every": 2, "threads": 1}},
        **{name: {"steps": {"A": steps, "B": steps}} for name in models},
    }
    return ExperimentBudget("small", document)
