"""How ``maesil/evaluation/paper.toml`` was found: steps that take equal time, and trials of rate and batch.

    python tests/benchmarks/tune_paper.py steps STORE --budget cpu-2h --seconds 1200
    python tests/benchmarks/tune_paper.py trials STORE --budget tiny --table A --lr 1e-3 3e-3 6e-3
    python tests/benchmarks/tune_paper.py trials STORE --budget cpu-2h --models ae --share 1 --batch 4 --lr 2e-3

Steps are counted in time of the processor, on one thread, so that other work on the machine does not count. Trials are
scored on the validation patients of the experiment's own split, or of ``--split``, never on test patients.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from method_trials import QUIET, TIMED, WARM_UP, taken

from maesil.config.schema import PAPER_KINDS, RunConfig
from maesil.data.split import Split, read_split
from maesil.evaluation.experiment import TABLES, ExperimentBudget, split_for
from maesil.evaluation.scores import PaperTable
from maesil.store.index import patients
from maesil.store.store import Store
from maesil.training.setup import prepare
from maesil.training.train import train


def print_steps(store: Path, budget: ExperimentBudget, split: Split, models: Sequence[str], seconds: float) -> None:
    """Print how many steps of each model fit into a time of one core (s)."""
    torch.set_num_threads(1)
    for model in models:
        fit = [f"{table} = {int(seconds / step_seconds(store, budget, split, model, table))}" for table in TABLES]
        print(f"{model}: {{ {', '.join(fit)} }}", flush=True)


def step_seconds(store: Path, budget: ExperimentBudget, split: Split, model: str, table: PaperTable) -> float:
    """Return what a step of a model takes on one core (s)."""
    return seconds_of(store, budget.config(model, table, 0, "cpu"), split)


def seconds_of(store: Path, settings: RunConfig, split: Split) -> float:
    """Return what a step of a configuration takes on one core (s)."""
    few = replace(settings.train, threads=1, minutes=0.0, steps=WARM_UP + TIMED)
    config = RunConfig(settings.model, settings.mask, few)
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare([store], config, Path(folder), resume=False, split=split, console=QUIET)
        ends = list(taken(trainer, WARM_UP + TIMED))
    return (ends[-1] - ends[WARM_UP - 1]) / TIMED


def print_trials(
    store: Path,
    budget: ExperimentBudget,
    split: Split,
    models: Sequence[str],
    table: str,
    rates: Sequence[float],
    share: float,
    batch: int | None,
) -> None:
    """Print the validation PSNR after a share of the budget's steps, for each learning rate.

    With another batch than the budget's, the steps are those that take the same time.
    """
    print("| model | learning rate | batch | steps | PSNR, validation (dB) | seconds |\n|" + " --- |" * 6)
    for model in models:
        for rate in rates:
            settings = with_batch(store, budget.config(model, table, 0, "auto"), split, batch)
            steps = max(1, round(share * settings.train.steps))
            tried = replace(settings.train, lr=rate, steps=steps, validate_every=steps)
            with tempfile.TemporaryDirectory() as folder:
                config = RunConfig(settings.model, settings.mask, tried)
                summary = train([store], config, Path(folder) / "run", split=split, console=QUIET)
            score = summary.last["validation_psnr"]
            print(f"| {model} | {rate:g} | {tried.batch} | {steps} | {score:.2f} | {summary.seconds:.0f} |", flush=True)


def with_batch(store: Path, settings: RunConfig, split: Split, batch: int | None) -> RunConfig:
    """Return a configuration with another batch, and as many steps as take the same time."""
    if batch is None:
        return settings
    changed = replace(settings, train=replace(settings.train, batch=batch))
    ratio = seconds_of(store, settings, split) / seconds_of(store, changed, split)
    return replace(changed, train=replace(changed.train, steps=round(ratio * settings.train.steps)))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("steps", "trials"))
    parser.add_argument("store", type=Path)
    parser.add_argument("--budget", default="tiny")
    parser.add_argument("--models", nargs="+", default=PAPER_KINDS)
    parser.add_argument("--seconds", type=float, default=100.0, help="of one core, a model and table")
    parser.add_argument("--split", type=Path, help="frozen split, as of `maesil store split`")
    parser.add_argument("--table", choices=tuple(TABLES), default="A")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3])
    parser.add_argument("--batch", type=int, help="crops per step (default: the budget's)")
    parser.add_argument("--share", type=float, default=0.5, help="of the budget's steps, for one trial")
    given = parser.parse_args()
    budget, store = ExperimentBudget.load(given.budget), Store.open(given.store)
    groups = patients([store])
    split = read_split(given.split, groups)[0] if given.split else split_for(budget, groups, seed=0)
    if given.what == "steps":
        print_steps(given.store, budget, split, given.models, given.seconds)
    else:
        print_trials(given.store, budget, split, given.models, given.table, given.lr, given.share, given.batch)


if __name__ == "__main__":
    main()
