"""Trials of the method at equal time: the table of ``docs/log.md``.

    python tests/benchmarks/method_trials.py STORE --split split.json --labels DIR \\
        --options "model.decoder=full" "model.decoder=cross model.decoded=0.5" --seeds 0 1 2

Each entry of ``--options`` is one variant of the preset ``tiny``. All have the time of ``--steps`` steps of the preset
with the options ``--base``, as time of the processor on one thread, so that other work on the machine does not count.
Scores are taken on the validation patients of the split, with the crops and the mask of the preset (variants with
another ``model.crop`` have crops of their own); ``interpolation`` is the naive
baseline on the same crops. R2 is that of a frozen probe of the labels (``--labels``, see
``docs/how-to/does-it-help.md``), which must not hold test patients.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from maesil.config.presets import PRESETS
from maesil.config.schema import RunConfig
from maesil.config.toml import load_config
from maesil.data.crops import Crop
from maesil.downstream.probe import probe
from maesil.evaluation.predict import naive_baselines, psnr_of_crops
from maesil.training.checkpoint import Run, load_run
from maesil.training.setup import prepare
from maesil.training.trainer import Trainer

QUIET = Console(quiet=True)
TIMED, WARM_UP = 8, 2
SCORES = (
    "validation_psnr", "validation_psnr_tokens", "encoder_gain_db", "encoder_gain_shuffled_db", "effective_rank",
    "interpolation",
)  # fmt: skip


def variant(options: str, seed: int, steps: int) -> RunConfig:
    """Return the preset with some options changed, on one thread."""
    fixed = [f"train.seed={seed}", f"train.steps={steps}", "train.threads=1"]
    return load_config("tiny", overrides=[*options.split(), *fixed])


def begun(asked: argparse.Namespace, config: RunConfig, out: Path) -> Trainer:
    """Return the trainer of a new run."""
    return prepare([asked.store], config, out, resume=False, split=asked.split, console=QUIET)


def taken(trainer: Trainer, steps: int) -> Iterator[float]:
    """Take steps; yield the time of the processor after each (s)."""
    with trainer.loader() as loader:
        for ready in trainer.prepared(loader.batches(0, steps)):
            trainer.training_step(ready)
            yield time.process_time()
    trainer.read()


def cost(asked: argparse.Namespace, options: str) -> float:
    """Return what a step of a variant takes (s)."""
    with tempfile.TemporaryDirectory() as out:
        ends = list(taken(begun(asked, variant(options, 0, WARM_UP + TIMED), Path(out)), WARM_UP + TIMED))
    # The fastest step: what else runs on the machine makes steps slower, never faster.
    return min(end - start for start, end in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False))


def scored(asked: argparse.Namespace, options: str, seed: int, steps: int) -> dict[str, float]:
    """Train a variant, and return its scores."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        trainer = begun(asked, variant(options, seed, steps), out)
        for _ in taken(trainer, steps):
            pass
        trainer.config = replace(trainer.config, mask=PRESETS["tiny"].mask)
        if trainer.config.model.crop == PRESETS["tiny"].model.crop:
            trainer.validation = begun(asked, variant("", seed, steps), Path(folder) / "preset").validation
        scores = trainer.validate() | trainer.encoder_gains()
        trainer.save(out)
        scores["interpolation"] = interpolated(load_run(out), trainer.validation)
        for labels in asked.labels:
            rows = probe(out, asked.store, labels, out=out / labels.name, device="cpu").rows
            (r2,) = (row["r2"] for row in rows if (row["encoder"], row["class"]) == (trainer.config.model.kind, "mean"))
            scores[f"R2 {labels.name}"] = float("nan") if r2 is None else r2
    return scores


def interpolated(run: Run, crops: Sequence[Crop]) -> float:
    """Return what the interpolation of the visible voxels scores on crops (dB)."""
    (baseline,) = (one for one in naive_baselines(run) if one.name == "interpolation")
    return psnr_of_crops(baseline, crops, run)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--labels", type=Path, nargs="*", default=[])
    parser.add_argument("--options", nargs="+", required=True, metavar="'SECTION.NAME=VALUE ...'")
    parser.add_argument("--base", default="", metavar="'SECTION.NAME=VALUE ...'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=150)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["options", "seed", "steps", *SCORES, *(f"R2 {labels.name}" for labels in asked.labels)]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    time_of_base = cost(asked, asked.base)
    for options in asked.options:
        steps = round(asked.steps * time_of_base / cost(asked, options))
        for seed in asked.seeds:
            scores = scored(asked, options, seed, steps)
            cells = [f"{scores[name]:.3f}" for name in columns[3:]]
            print(f"| {options} | {seed} | {steps} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
