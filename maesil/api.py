"""`maesil.train` and `maesil.evaluate`: the commands of these names as functions, for scripts and notebooks.

Paths may be text. Every foreseen error is a `maesil.errors.MaesilError`. `maesil.ingest` is in `maesil.ingest`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maesil.config.schema import RunConfig
    from maesil.data.split import Split
    from maesil.evaluation.scores import Report
    from maesil.store.urls import StorePlace
    from maesil.training.train import TrainSummary


def train(
    stores: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    preset: str | None = None,
    config: RunConfig | Path | str | None = None,
    overrides: Iterable[str] = (),
    weights: Sequence[float] = (),
    where: str = "",
    split: Split | Path | str | None = None,
    resume: bool = False,
) -> TrainSummary:
    """Pre-train a model on one or more stores and leave checkpoint, log and pictures in ``out``.

    ``preset`` is ``tiny``, ``small``, ``base``, ``large``, or ``primus-s`` to ``primus-l``. ``config`` is a TOML file,
    or a `RunConfig` that takes the place of preset and file. ``overrides`` are such as ``"train.steps=200"``.
    ``weights`` are the shares of the crops that each store gives. ``where`` is a filter. ``split`` says which patients
    are trained on. ``resume`` goes on
    from the last checkpoint. Raises UsageError, NoInputError, StoreError, CheckpointError and ResourceError.
    """
    from maesil.config.schema import RunConfig
    from maesil.config.toml import load_config
    from maesil.errors import UsageError
    from maesil.training.train import train as run_training

    if isinstance(config, RunConfig):
        if preset:
            raise UsageError(f"preset={preset!r}: expected a preset or a RunConfig, found both; leave one out")
        chosen = load_config(None, None, overrides, base=config)
    else:
        chosen = load_config(preset, Path(config) if config else None, overrides)
    if where:
        chosen = replace(chosen, train=replace(chosen.train, where=where))
    split = Path(split) if isinstance(split, str) else split
    return run_training(_places(stores), chosen, Path(out), resume=resume, split=split, weights=weights)


def evaluate(
    run: Path | str,
    store: Path | str,
    *,
    out: Path | str | None = None,
    volumes: Sequence[str] | None = None,
    where: str = "",
    split: Path | str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Report:
    """Score a run and the naive baselines on the patients of a store that the run was not trained on.

    ``volumes`` are volume ids, or ``["all"]``. ``where`` is a filter. ``split`` is a frozen split, of which the test
    patients are scored. Scores and pictures also go to ``out``, by default ``RUN/evaluation``. Raises UsageError,
    NoInputError, StoreError and CheckpointError.
    """
    from maesil.evaluation.evaluate import evaluate as run_evaluation
    from maesil.store.urls import place_of

    return run_evaluation(
        Path(run), place_of(store), out=Path(out) if out else None, volumes=volumes, where=where,
        split_file=Path(split) if split else None, seed=seed, device=device,
    )  # fmt: skip


def _places(places: Path | str | Sequence[Path | str]) -> list[StorePlace]:
    from maesil.store.urls import place_of

    return [place_of(places)] if isinstance(places, Path | str) else [place_of(place) for place in places]
