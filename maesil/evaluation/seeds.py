"""The experiment with several seeds: one table of their means, with the spread that the seed alone makes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console

from maesil.errors import UsageError
from maesil.evaluation.experiment import ExperimentBudget, run_paper_experiment
from maesil.evaluation.report import Experiment, Trained, write_report
from maesil.evaluation.scores import VolumeRow
from maesil.store.urls import StorePlace


def run_with_seeds(
    stores: Sequence[StorePlace], out: Path, budget: ExperimentBudget, seeds: Sequence[int], **options: Any
) -> Experiment:
    """Run the experiment once per seed, in ``out/seed-N``; write the tables of their means to ``out``.

    The seed changes weights, crops, masks and the masks of the scores. The split of the patients is that of the first
    seed, so that all seeds score the same patients. ``options`` are those of
    `maesil.evaluation.experiment.run_paper_experiment`, and so are the errors; UsageError if ``out`` holds the
    experiment of one seed.
    """
    if (out / "experiment.json").exists():
        raise UsageError(f"{out}: expected a folder for several seeds, found the experiment of one; name another --out")
    console = options.pop("console", None) or Console(stderr=True, soft_wrap=True)
    made = []
    for seed in seeds:
        console.print(f"seed {seed}", style="bold")
        folder = out / f"seed-{seed}"
        given = {**options, "seed": seed, "split_seed": seeds[0], "console": console}
        made.append(run_paper_experiment(stores, folder, budget, **given))
    experiment = mean_of_seeds(made)
    write_report(experiment, out)
    return experiment


def mean_of_seeds(experiments: Sequence[Experiment]) -> Experiment:
    """Return the experiment whose scores are the means over experiments that differ in their seeds alone."""
    first = experiments[0]
    runs = [_mean_run(same) for same in zip(*(one.runs for one in experiments), strict=True)]
    names = first.naive_curves
    return replace(
        first,
        seeds=tuple(seed for one in experiments for seed in one.seeds),
        runs=tuple(runs),
        naive=mean_volume_rows([row for one in experiments for row in one.naive]),
        naive_curves={name: float(np.mean([one.naive_curves[name] for one in experiments])) for name in names},
        of_seeds=tuple(one.rows() for one in experiments),
    )


def _mean_run(same: Sequence[Trained]) -> Trained:
    """Return one model of one table; its run and cost are those of the first seed."""
    return replace(
        same[0],
        scored=mean_volume_rows([row for one in same for row in one.scored]),
        seconds=float(np.mean([one.seconds for one in same])),
        folders=tuple(folder for one in same for folder in one.folders),
    )


def mean_volume_rows(rows: Iterable[VolumeRow]) -> list[VolumeRow]:
    """Average the rows of the same model, volume, region and group of voxels, number by number.

    A number that is missing, None or NaN in some of them is the mean of the others.
    """
    groups: dict[tuple[Any, ...], list[VolumeRow]] = {}
    for row in rows:
        same = (row["model"], row["volume_id"], row["region"], row.get("group_by"), row.get("group_name"))
        groups.setdefault(same, []).append(row)
    return [
        cast(VolumeRow, {name: _mean([row.get(name) for row in group]) for name in group[0]})
        for group in groups.values()
    ]


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean of what are numbers or lists of numbers; what are words are the same in all."""
    if isinstance(values[0], str):
        return values[0]
    known = [value for value in values if value is not None and not (isinstance(value, float) and math.isnan(value))]
    if not known:
        return None
    mean = np.mean(known, axis=0)
    return mean.tolist() if mean.ndim else float(mean)
