"""Few-shot segmentation: what all starts share, what is frozen, and who is learnt from."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.labelled import labelled_store
from support.proofs import of_patches
from support.runs import SMALL, save_run

from maesil.data.split import Split
from maesil.downstream import few_shot
from maesil.downstream.adapters import AdaptedEncoder
from maesil.downstream.few_shot import Course, Lesson, first_patients, learn, numbers_of_patients, starts_of
from maesil.downstream.finetune import FinetuneBudget
from maesil.downstream.labels import load_labels
from maesil.downstream.segmenter import Segmenter
from maesil.store.reader import SuperpatchReader
from maesil.training.checkpoint import load_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few_shot")
    store, labels_dir, volumes = labelled_store(folder, 3, (24, 17, 24), spacing=(14.0, 14.0, 14.0))
    labels = load_labels(labels_dir, volumes, folder / "scratch")
    learnt = {volume.group: (volume,) for volume in volumes[:2]}
    scored = {volumes[2].group: (volumes[2],)}
    budget = FinetuneBudget(steps=4, batch=1, lr=1e-3)
    course = Course(SuperpatchReader(store), labels, learnt, scored, budget, 2, 8.0, torch.device("cpu"))
    model = replace(SMALL, crop=16)  # a step on crops of 32^3 takes eight times as long
    run = load_run(save_run(folder / "run", Split((), ()), model))
    theirs = AdaptedEncoder("theirs", of_patches, model, run.intensity)
    return course, {start.name: start for start in starts_of(run, "maesil", {"theirs": theirs})}, run


def test_frozen_encoders_stay_and_the_others_learn(world, monkeypatch):
    course, starts, _ = world
    made: list[tuple[Segmenter, dict]] = []
    make = few_shot.segmenter_on

    def watched(*given):
        model = make(*given)
        made.append((model, copy.deepcopy(model.state_dict())))
        return model

    monkeypatch.setattr(few_shot, "segmenter_on", watched)
    moved = {}
    for name, start in starts.items():
        list(learn(Lesson(1, 0, start), course))
        model, before = made[-1]
        changed = {part for part, value in model.state_dict().items() if not torch.equal(value, before[part])}
        moved[name] = any(part.startswith("encoder.") for part in changed)
        assert any(part.startswith("decoder.") for part in changed)
    assert moved == {
        "maesil": True, "scratch": True, "maesil, frozen": False, "untrained, frozen": False, "theirs, frozen": False,
        "shuffled labels": True,
    }  # fmt: skip
    # The decoder of all starts of one width is the same at first, and the run's own weights are as they were.
    decoders = [{n: v for n, v in before.items() if not n.startswith("encoder.")} for _, before in made[:4]]
    assert all(torch.equal(one[name], decoders[0][name]) for one in decoders for name in decoders[0])


def test_the_weights_of_the_run_are_not_touched(world):
    course, starts, run = world
    before = run.weights_sha256()
    list(learn(Lesson(2, 0, starts["maesil"]), course))
    assert run.weights_sha256() == before


def test_dice_is_taken_on_the_way_and_the_surface_at_the_end_alone(world):
    course, starts, _ = world
    steps = list(learn(Lesson(2, 5, starts["scratch"]), course))
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    assert [bool(rows) for _, rows in steps] == [False, True, False, True]
    assert {row.score for row in steps[1][1]} == {"dice"} and {row.score for row in steps[3][1]} == {
        "dice",
        "surface_dice",
    }
    for step, rows in steps:
        for row in rows:
            assert (row.encoder, row.patient, row.shots, row.seed, row.step) == ("scratch", "patient-2", 2, 5, step)
            assert 0 <= row.value <= 1
    volume = course.scored["patient-2"][0]
    present = {course.labels.classes[k - 1] for k in np.unique(course.labels.of(volume)) if 0 < k < 255}
    assert {row.organ for row in steps[3][1]} == present


def test_fewer_patients_are_among_more_and_the_seed_alone_says_who():
    learnt = {f"p{number}": () for number in range(9)}
    orders = [first_patients(learnt, 9, seed) for seed in range(6)]
    assert len({tuple(order) for order in orders}) > 3 and all(sorted(one) == sorted(learnt) for one in orders)
    for seed, order in enumerate(orders):
        assert [first_patients(learnt, number, seed) for number in (1, 2, 4)] == [order[:1], order[:2], order[:4]]


def test_numbers_of_patients():
    assert numbers_of_patients((1, 2, 4, 8, 0), 5) == [1, 2, 4, 5]
    assert numbers_of_patients((1, 0), 1) == [1] and numbers_of_patients((0,), 7) == [7]


def test_the_control_is_taught_with_labels_of_other_places_and_scored_with_the_right_ones(world, monkeypatch):
    course, starts, _ = world
    taught = []
    train = few_shot.train_segmenter

    def watched(model, reader, labels, task, *given):
        taught.append(labels)
        return train(model, reader, labels, task, *given)

    monkeypatch.setattr(few_shot, "train_segmenter", watched)
    *_, (_, last) = learn(Lesson(2, 0, starts["shuffled labels"]), course)
    list(learn(Lesson(2, 0, starts["maesil"]), course))
    assert taught[1] is course.labels
    for (volume,) in course.learnt.values():
        right, wrong = course.labels.of(volume), taught[0].of(volume)
        assert np.array_equal(np.bincount(right.ravel()), np.bincount(wrong.ravel())) and right.shape == wrong.shape
        assert not np.array_equal(right, wrong) and np.array_equal(wrong, taught[0].of(volume))
    everywhere = {row.organ: row.value for row in last if row.encoder == "organ everywhere"}
    truth = course.labels.of(course.scored["patient-2"][0])
    for number, organ in enumerate(course.labels.classes, start=1):
        p = float((truth == number).sum() / (truth != 255).sum())
        if p:
            assert everywhere[organ] == pytest.approx(2 * p / (1 + p), abs=1e-6)
    assert {row.organ for row in last if row.encoder == "shuffled labels"} == set(everywhere)


@pytest.mark.parametrize("called", [0.01, 0.2, 0.9])
def test_a_blind_guess_expects_less_than_the_organ_everywhere(called):
    rng = np.random.default_rng(0)
    truth, guess = rng.random(200_000) < 0.1, rng.random(200_000) < called
    dice = 2 * (truth & guess).sum() / (truth.sum() + guess.sum())
    everywhere = few_shot.dice_of_everywhere(torch.from_numpy(truth.astype(np.uint8)), 1)
    assert dice < everywhere == pytest.approx(2 / (1 + 1 / truth.mean()), abs=1e-6)
