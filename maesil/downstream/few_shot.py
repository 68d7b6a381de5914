"""Segmentation from 1, 2, 4, ... all patients: pre-trained against scratch against frozen encoders.

For one number of patients and one seed all starts have the same patients, decoder, crops, order of crops and steps.
They differ in the encoder's first weights, and in whether it goes on learning.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maesil.downstream.finetune import FinetuneBudget, segmented, segmenter_on, train_segmenter
from maesil.downstream.labels import UNLABELLED, Labels
from maesil.downstream.scored import EVERYWHERE, SHUFFLED, Row
from maesil.downstream.segmenter import DiceSums, Segmenter
from maesil.downstream.surface import surface_dice
from maesil.downstream.tasks import Task, task_of
from maesil.models.encoders import Backbone, encoder_of, untrained_encoder
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.training.checkpoint import Run

SCRATCH = "scratch"


@dataclass(frozen=True)
class Start:
    """Where learning begins."""

    name: str
    encoder: Callable[[int], Backbone]
    """Makes it, by a seed."""
    frozen: bool
    shuffled: bool = False
    """Whether it is taught with labels of other places: a control."""


@dataclass(frozen=True)
class Lesson:
    """One segmentation to learn: from how many patients, by which seed, with which start."""

    shots: int
    seed: int
    start: Start


@dataclass(frozen=True)
class Course:
    """What all lessons share."""

    reader: SuperpatchReader
    labels: Labels
    learnt: Mapping[str, Sequence[Volume]]
    scored: Mapping[str, Sequence[Volume]]
    budget: FinetuneBudget
    points: int
    """How often the Dice is taken on the way, the end included."""
    tolerance_mm: float
    """Of the surface Dice."""
    device: torch.device


def starts_of(run: Run, first: str, others: Mapping[str, Backbone]) -> list[Start]:
    """Return the starts: the run's encoder and its untrained twin, learning and frozen; others, frozen; the control."""

    def pretrained(_: int) -> Backbone:
        return copy.deepcopy(encoder_of(run.model, run.intensity))

    def untrained(seed: int) -> Backbone:
        return untrained_encoder(run.config.model, run.intensity, seed)

    return [
        Start(first, pretrained, frozen=False),
        Start(SCRATCH, untrained, frozen=False),
        Start(frozen_name(first), pretrained, frozen=True),
        Start(frozen_name("untrained"), untrained, frozen=True),
        *(Start(frozen_name(name), _always(encoder), frozen=True) for name, encoder in others.items()),
        Start(SHUFFLED, pretrained, frozen=False, shuffled=True),
    ]


def _always(encoder: Backbone) -> Callable[[int], Backbone]:
    return lambda _: encoder


def frozen_name(name: str) -> str:
    """Return what a frozen encoder is called in a table of segmentations."""
    return f"{name}, frozen"


def numbers_of_patients(asked: Sequence[int], there_are: int) -> list[int]:
    """Return the numbers of patients to learn from, ascending; 0 stands for all."""
    return sorted({min(number, there_are) if number else there_are for number in asked})


def first_patients(learnt: Mapping[str, Sequence[Volume]], number: int, seed: int) -> list[str]:
    """Return the patients that a lesson learns from: those of fewer patients are among those of more."""
    return sorted(learnt, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())[:number]


def learn(lesson: Lesson, course: Course) -> Iterator[tuple[int, list[Row]]]:
    """Learn one segmentation; after each step yield how many are done, and the rows if scores are taken there."""
    encoder, classes = lesson.start.encoder(lesson.seed), len(course.labels.classes)
    model = segmenter_on(encoder, classes, lesson.seed, course.budget).to(course.device)
    if lesson.start.frozen:
        model.encoder.requires_grad_(False)
    patients = first_patients(course.learnt, lesson.shots, lesson.seed)
    train = [volume for name in patients for volume in course.learnt[name]]
    test = [volume for volumes in course.scored.values() for volume in volumes]
    task, steps = task_of(course.reader, train, test, model.encoder.config.crop), course.budget.steps
    stops = {max(1, steps * number // course.points) for number in range(1, course.points + 1)}
    taught = course.labels.elsewhere(lesson.seed) if lesson.start.shuffled else course.labels
    of_lesson = Row("dice", lesson.start.name, "", 0.0, "", lesson.shots, lesson.seed)
    for step in train_segmenter(model, course.reader, taught, task, course.budget, lesson.seed):
        rows = list(_score(model, course, task, replace(of_lesson, step=step), step == steps)) if step in stops else []
        model.train()
        yield step, rows


def _score(model: Segmenter, course: Course, task: Task, row: Row, last: bool) -> Iterator[Row]:
    """Yield the Dice, and at the last step the surface Dice, of the organs that the labels of a volume hold.

    Where the labels hold none of an organ, all starts would score 0 or nothing: false alarms there do not count.
    """
    patient_of = {volume.volume_id: name for name, volumes in course.scored.items() for volume in volumes}
    for volume, predicted, truth in segmented(model, course.reader, course.labels, task.test):
        sums = DiceSums(len(course.labels.classes))
        sums.add(predicted, truth)
        for k, organ in enumerate(course.labels.classes, start=1):
            if not (truth == k).any():
                continue
            of_organ = replace(row, patient=patient_of[volume.volume_id], organ=organ)
            yield replace(of_organ, value=sums.dice[k - 1] or 0.0)
            if not last:
                continue
            if row.encoder == SHUFFLED:
                yield replace(of_organ, encoder=EVERYWHERE, value=dice_of_everywhere(truth, k))
            if (found := surface_dice(predicted == k, truth == k, volume.spacing, course.tolerance_mm)) is not None:
                yield replace(of_organ, score="surface_dice", value=found)


def dice_of_everywhere(truth: Tensor, k: int) -> float:
    """Return the Dice of calling every labelled voxel the organ ``k``.

    With a share p of organ it is 2p / (1 + p). A guess that takes no notice of where the organ is expects less,
    whichever share q of the voxels it calls the organ: 2pq / (p + q).
    """
    share = float((truth == k).sum() / (truth != UNLABELLED).sum())
    return 2 * share / (1 + share)
