"""The crops that a segmentation is learnt from, and those that it is scored on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from maesil.data.crops import grid_origins
from maesil.data.split import split_groups
from maesil.downstream.folds import Patients, longest_axis
from maesil.downstream.labels import Labels
from maesil.errors import NoInputError
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.text import counted
from maesil.types import Edges, Zyx, zyx

LEAST_BODY = 0.1
"""Share of body from which on a crop is trained on."""


@dataclass(frozen=True)
class Place:
    """A crop of a volume."""

    volume: Volume
    origin: Zyx


@dataclass(frozen=True)
class Task:
    """What is learnt from and what is scored; no voxel is in both."""

    train: tuple[Place, ...]
    test: tuple[Place, ...]
    told: str


def choose_task(
    reader: SuperpatchReader, labels: Labels, patients: Patients, crop: Edges, share: float, seed: int
) -> Task:
    """Choose who is scored: a share of the unseen patients, at least one and never all; of one, the middle block."""
    by_id = {volume.volume_id: volume for volume in labels.volumes}
    everyone = [*patients.unseen, *patients.seen]
    if len(everyone) == 1:
        volume = max((by_id[v] for v in everyone[0]), key=lambda one: math.prod(one.shape))
        task = _middle_block(reader, volume, crop)
        unused = len(everyone[0]) - 1
        return replace(task, told=f"{task.told}; {unused} more of its volumes not used") if unused else task
    by_name = {patient[0]: patient for patient in everyone}
    scored = split_groups([patient[0] for patient in patients.unseen], share, seed).validation or (
        patients.unseen[0][0],
    )
    test = [by_id[v] for name in scored for v in by_name[name]]
    train = [by_id[v] for name, patient in by_name.items() if name not in scored for v in patient]
    told = f"{counted(len(by_name) - len(scored), 'patient')} learnt from, {counted(len(scored), 'other')} scored"
    return task_of(reader, train, test, crop, told)


def task_of(
    reader: SuperpatchReader, train: Sequence[Volume], test: Sequence[Volume], crop: Edges, told: str = ""
) -> Task:
    """Return the crops of the volumes that are learnt from and of those that are scored; NoInputError for none."""
    learnt, scored = ([place for volume in some for place in _places(volume, crop)] for some in (train, test))
    return _task(learnt, scored, reader, crop, told)


def _middle_block(reader: SuperpatchReader, volume: Volume, crop: Edges) -> Task:
    axis = longest_axis(volume.shape, crop)
    edge = zyx(crop)[axis]
    last = max(place.origin[axis] for place in _places(volume, crop))
    at = last // edge // 2 * edge if last > edge else edge
    block = [place for place in _places(volume, crop) if place.origin[axis] == at]
    others = [place for place in _places(volume, crop) if place.origin[axis] != at]
    told = f"one labelled patient: {'zyx'[axis]} {at} to {at + edge} scored, the rest learnt from"
    return _task(others, block, reader, crop, told)


def _task(train: list[Place], test: list[Place], reader: SuperpatchReader, crop: Edges, told: str) -> Task:
    size = zyx(crop)

    def share(place: Place, name: str) -> float:
        return float(reader.read_map_region(place.volume.volume_id, name, place.origin, size).mean()) / 255

    usable = tuple(place for place in train if share(place, "body") >= LEAST_BODY)
    scored = tuple(place for place in test if share(place, "valid") > 0)
    if not usable or not scored:
        raise NoInputError(
            f"expected crops with a body share of {LEAST_BODY} to train on and valid ones to score, found none"
        )
    return Task(usable, scored, told)


def _places(volume: Volume, crop: Edges) -> Iterator[Place]:
    for origin in grid_origins(volume, crop):
        yield Place(volume, origin)
