"""Trials of a segmentation on validation patients: the rate of `maesil prove`, and what a step costs.

    python tests/benchmarks/segmentation_trials.py RUN STORE --labels DIR --split FILE \\
        --starts pretrained scratch --lr 1e-3 3e-3 1e-2

Learns from the training patients of the split and scores its validation patients; the labels must not hold others.
Dice is the mean over patients and classes, at half of the steps and at their end. Time is that of the processor, on one
thread, for a step of ``--batch`` crops: the fastest of all steps, since other work makes steps slower and never faster.
``--steps 8 --lr 1e-3 --resolution full half`` compares the two decoders in a minute.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from maesil.config.schema import require_tile
from maesil.data.split import read_split
from maesil.downstream.finetune import FinetuneBudget, score_segmenter, segmenter_on, train_segmenter
from maesil.downstream.labels import Labels, load_labels
from maesil.downstream.segmenter import Segmenter
from maesil.downstream.tasks import Task, task_of
from maesil.models.encoders import encoder_of, untrained_encoder
from maesil.store.index import patients
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.training.checkpoint import Run, load_run

STARTS = ("pretrained", "scratch", "frozen")


def started(run: Run, start: str, classes: int, seed: int, budget: FinetuneBudget) -> Segmenter:
    """Return a segmenter whose encoder is as the start says."""
    scratch = start == "scratch"
    encoder = (
        untrained_encoder(run.config.model, run.intensity, seed) if scratch else encoder_of(run.model, run.intensity)
    )
    model = segmenter_on(encoder, classes, seed, budget)
    model.encoder.requires_grad_(start != "frozen")
    return model


def trial(
    model: Segmenter, reader: SuperpatchReader, labels: Labels, task: Task, budget: FinetuneBudget, seed: int
) -> Iterator[float]:
    """Train; yield the mean Dice at half of the steps and at their end, then the seconds of the fastest step."""
    fastest, begun = float("inf"), time.process_time()
    for step in train_segmenter(model, reader, labels, task, budget, seed):
        if step > 1:  # before the first, crops that hold a class are looked for
            fastest = min(fastest, time.process_time() - begun)
        if step in (budget.steps // 2, budget.steps):
            found = [row["dice"] or 0.0 for row in score_segmenter(model, reader, labels, task.test)]
            model.train()
            yield sum(found) / len(found)
        begun = time.process_time()
    yield fastest


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["pretrained", "scratch"])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--resolution", nargs="+", choices=("half", "full"), default=["half"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    store = Store.open(asked.store)
    reader = SuperpatchReader(store)
    split, _ = read_split(asked.split, patients([store]))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        labels = load_labels(asked.labels, store.volumes(), Path(scratch))
        run = load_run(asked.run)
        require_tile(run.config.model, store.superpatch, store.path)
        learnt, scored = ([v for v in labels.volumes if v.group in part] for part in (split.train, split.validation))
        task = task_of(reader, learnt, scored, run.config.model.crop)
        print("| start | resolution | rate | Dice at half | at the end | CPU seconds per step |\n|" + " --- |" * 6)
        for resolution in asked.resolution:
            for start in asked.starts:
                for lr in asked.lr:
                    budget = FinetuneBudget(asked.steps, asked.batch, lr, half_resolution=resolution == "half")
                    # A run of its own for each: training changes the encoder.
                    model = started(load_run(asked.run), start, len(labels.classes), asked.seed, budget)
                    half, end, seconds = trial(model, reader, labels, task, budget, asked.seed)
                    print(f"| {start} | {resolution} | {lr:g} | {half:.3f} | {end:.3f} | {seconds:.2f} |", flush=True)
                    rows.append(
                        {"start": start, "resolution": resolution, "lr": lr, "half": half, "end": end, "s": seconds}
                    )
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
