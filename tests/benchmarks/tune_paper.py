"""How ``maesil/evaluation/paper.toml`` was found: steps that take equal time, and trials of the learning rate.

    python tests/benchmarks/tune_paper.py steps STORE --budget tiny --seconds 100
    python tests/benchmarks/tune_paper.py trials STORE --budget tiny --table A --lr 1e-3 3e-3 6e-3

Trials are scored on the validation patients of the experiment's own split, or of ``--split``, never on test patients.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from maesil.config.schema import MODEL_KINDS, RunConfig
from maesil.data.split import Split, read_split
from maesil.evaluation.experiment import TABLES, Budget, split_for
from maesil.store.index import patients
from maesil.store.store import Store
from maesil.training.setup import prepare, steps_that_fit
from maesil.training.train import train

QUIET = Console(quiet=True)


def print_steps(store: Path, budget: Budget, split: Split, models: Sequence[str], seconds: float) -> None:
    """Print how many steps of each model fit into a time."""
    for model in models:
        fit = []
        for table in TABLES:
            with tempfile.TemporaryDirectory() as folder:
                config = budget.config(model, table, 0, "auto")
                trainer = prepare([store], config, Path(folder), resume=False, split=split, console=QUIET)
                fit.append(f"{table} = {steps_that_fit(trainer, seconds / 60)}")
        print(f"{model}: {{ {', '.join(fit)} }}", flush=True)


def print_trials(
    store: Path, budget: Budget, split: Split, models: Sequence[str], table: str, rates: Sequence[float], share: float
) -> None:
    """Print the validation PSNR after a share of the budget's steps, for each learning rate."""
    print("| model | learning rate | batch | steps | PSNR, validation (dB) | seconds |\n|" + " --- |" * 6)
    for model in models:
        for rate in rates:
            settings = budget.config(model, table, 0, "auto")
            steps = max(1, round(share * settings.train.steps))
            tried = replace(settings.train, lr=rate, steps=steps, validate_every=steps)
            with tempfile.TemporaryDirectory() as folder:
                config = RunConfig(settings.model, settings.mask, tried)
                summary = train([store], config, Path(folder) / "run", split=split, console=QUIET)
            score = summary.last["validation_psnr"]
            print(f"| {model} | {rate:g} | {tried.batch} | {steps} | {score:.2f} | {summary.seconds:.0f} |", flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("steps", "trials"))
    parser.add_argument("store", type=Path)
    parser.add_argument("--budget", default="tiny")
    parser.add_argument("--models", nargs="+", default=MODEL_KINDS)
    parser.add_argument("--seconds", type=float, default=100.0, help="of training, a model and table")
    parser.add_argument("--split", type=Path, help="frozen split, as of `maesil store split`")
    parser.add_argument("--table", choices=tuple(TABLES), default="A")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3])
    parser.add_argument("--share", type=float, default=0.5, help="of the budget's steps, for one trial")
    given = parser.parse_args()
    budget, store = Budget.load(given.budget), Store.open(given.store)
    groups = patients([store])
    split = read_split(given.split, groups)[0] if given.split else split_for(budget, groups, seed=0)
    if given.what == "steps":
        print_steps(given.store, budget, split, given.models, given.seconds)
    else:
        print_trials(given.store, budget, split, given.models, given.table, given.lr, given.share)


if __name__ == "__main__":
    main()
