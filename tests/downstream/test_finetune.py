"""Fine-tuning on phantoms: who is kept apart, what both starts share, and that it learns."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.labelled import SPACING, labelled_store
from support.runs import SMALL, save_run
from support.stores import add_volume, make_store
from torch.optim.optimizer import register_optimizer_step_pre_hook

from maesil.config.schema import TrainConfig
from maesil.data.known_scans import record_scans
from maesil.data.split import Split
from maesil.documents import read_json
from maesil.downstream.finetune import (
    FinetuneBudget,
    _batch,
    _draw,
    _holds_class,
    _rare,
    _start,
    finetune,
    score_segmenter,
    train_segmenter,
)
from maesil.downstream.folds import Patients, patients_of
from maesil.downstream.labels import UNLABELLED, Labels, load_labels
from maesil.downstream.segmenter import segmentation_loss
from maesil.downstream.tasks import Place, Task, choose_task
from maesil.errors import UsageError
from maesil.models.encoders import encoder_of
from maesil.store.index import patients
from maesil.store.reader import SuperpatchReader
from maesil.synthetic.phantom import ORGANS
from maesil.training.checkpoint import load_run
from maesil.training.optim import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")
CROP = 16
"""Of the run that is fine-tuned: a step on crops of 32^3 takes eight times as long."""
INSIDE = (0, 16, 16)
"""Where a crop holds lung and what is none."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    store, labels_dir, volumes = labelled_store(folder, 4)
    run = save_run(folder / "run", Split(("patient-0",), ("patient-1",)), replace(SMALL, crop=CROP))
    labels = load_labels(labels_dir, store.volumes(), folder / "scratch")
    return store, labels_dir, volumes, run, SuperpatchReader(store), labels


def ids(places):
    return {place.volume.volume_id for place in places}


def test_only_unseen_patients_are_scored_and_nobody_is_in_both_parts(world):
    store, _, volumes, _, reader, labels = world
    found = patients_of(patients([store]), labels.volumes, {"patient-0"}, 0, include_trained=False)
    for seed in range(4):
        for share in (0.01, 0.34, 0.9):
            task = choose_task(reader, labels, found, 32, share, seed)
            assert ids(task.test) and not ids(task.test) & ids(task.train)
            assert volumes[0].volume_id in ids(task.train)
            assert ids(task.test) | ids(task.train) == {volume.volume_id for volume in volumes}


def test_with_one_unseen_patient_that_one_is_scored(world):
    _, _, volumes, _, reader, labels = world
    a, b = ((volume.volume_id,) for volume in volumes[:2])
    task = choose_task(reader, labels, Patients((a,), (b,)), 32, 0.25, 0)
    assert (ids(task.test), ids(task.train)) == (set(a), set(b))


def test_one_patient_alone_is_cut_at_its_middle_block(world):
    _, _, volumes, _, reader, labels = world
    task = choose_task(reader, labels, Patients(((volumes[2].volume_id,),), ()), 16, 0.25, 0)
    assert {place.origin[0] for place in task.test} == {16} and {place.origin[0] for place in task.train} == {0, 32}
    assert "one labelled patient: z 16 to 32 scored" in task.told
    both = Patients((tuple(volume.volume_id for volume in volumes[2:4]),), ())
    task = choose_task(reader, labels, both, 16, 0.25, 0)
    assert len(ids(task.train) | ids(task.test)) == 1 and "1 more of its volumes not used" in task.told


def test_a_batch_holds_the_labels_of_its_own_voxels_and_none_outside_the_scan(world):
    _, _, volumes, _, reader, labels = world
    hu, truth = _batch(reader, labels, [Place(volumes[1], (32, 0, 32)), Place(volumes[3], (0, 32, 0))], 32)
    assert (hu.dtype, truth.dtype, truth.shape) == (torch.int16, torch.uint8, (2, 32, 32, 32))
    whole = np.asarray(labels.of(volumes[1]))
    assert np.array_equal(truth[0, :16, :, :16], whole[32:, :32, 32:]) and (truth[0, 16:] == 255).all()
    assert (truth[1, :, 8:] == 255).all()  # the volume has 34 rows, the last cell of the maps ends at 40
    assert np.array_equal(truth[1, :, :2], np.asarray(labels.of(volumes[3]))[:32, 32:34, :32])


def test_both_starts_share_the_decoder_and_the_crops_and_differ_in_the_encoder(world):
    _, _, volumes, run_dir, *_ = world
    run = load_run(run_dir)
    pretrained, scratch, again = (
        _start(run, start, 4, 7, FinetuneBudget()) for start in ("pretrained", "scratch", "scratch")
    )
    for name, value in scratch.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if not name.startswith("encoder."):
            assert torch.equal(value, pretrained.state_dict()[name])
    assert not torch.equal(scratch.encoder.patch_embed.weight, pretrained.encoder.patch_embed.weight)
    encoder = encoder_of(run.model, run.intensity)
    assert torch.equal(pretrained.encoder.patch_embed.weight, encoder.patch_embed.weight)
    assert pretrained.encoder.patch_embed.weight is not encoder.patch_embed.weight
    places = [Place(volume, (0, 0, 0)) for volume in volumes]
    draws = [_draw(places, [], 1, step, 3) for step in range(20)]
    assert draws == [_draw(places, [], 1, step, 3) for step in range(20)]
    assert ids(p for draw in draws for p in draw) == ids(places)


def test_a_third_of_the_crops_is_drawn_among_those_that_hold_a_class(world):
    _, _, volumes, *_ = world
    places, rare = [Place(volumes[0], (0, 0, x)) for x in range(100)], Place(volumes[0], (0, 0, 7))
    drawn = [place for step in range(1000) for place in _draw(places, [rare], 5, step, 2)]
    expected = 1 / 3 + 2 / 3 / 100
    assert drawn.count(rare) / len(drawn) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5)
    assert len({place.origin for place in drawn}) == 100


def test_crops_hold_a_class_where_a_label_says_so(world):
    _, _, volumes, _, _, labels = world
    truth = labels.of(volumes[1])
    for x in range(0, volumes[1].shape[2] - 31, 8):
        part = np.asarray(truth[:32, :32, x : x + 32])
        assert _holds_class(Place(volumes[1], (0, 0, x)), labels, 32) == bool(np.isin(part, (1, 2, 3, 4)).any())
    beyond = Place(volumes[1], tuple(volumes[1].shape))
    assert not _holds_class(beyond, labels, 32)


def test_it_learns_a_crop_by_heart(world):
    _, _, volumes, run_dir, reader, labels = world
    model = _start(load_run(run_dir), "pretrained", len(ORGANS), 0, FinetuneBudget())
    place = Place(volumes[1], INSIDE)
    before = score_segmenter(model, reader, labels, [place])
    task, budget = Task((place,), (place,), ""), FinetuneBudget(steps=25, batch=1, lr=5e-3)
    assert list(train_segmenter(model, reader, labels, task, budget, 0)) == list(range(1, 26))
    after = {row["class"]: row["dice"] for row in score_segmenter(model, reader, labels, [place])}
    assert after["lung"] > 0.8 > 0.5 > next(row["dice"] for row in before if row["class"] == "lung")


def test_the_rate_is_that_of_training_and_reaches_its_peak(world):
    _, _, volumes, run_dir, reader, labels = world
    model = _start(load_run(run_dir), "scratch", len(ORGANS), 0, FinetuneBudget())
    place, rates = Place(volumes[1], (0, 0, 0)), []
    watch = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    task, budget = Task((place,), (place,), ""), FinetuneBudget(steps=20, batch=1, lr=3e-3)
    list(train_segmenter(model, reader, labels, task, budget, 0))
    watch.remove()
    training = TrainConfig(steps=20, lr=3e-3, warmup=0.1)
    assert rates == [learning_rate(step, training) for step in range(20)]
    assert max(rates) == 3e-3 == rates[1] and 0 < rates[-1] < 0.01 * 3e-3


@pytest.mark.slow
def test_the_whole_command_writes_what_it_found(world, tmp_path):
    store, labels_dir, volumes, run, *_ = world
    budget = FinetuneBudget(steps=2, batch=1, seeds=2)
    report = finetune(run, store.path, labels_dir, tmp_path / "out", budget=budget, device="cpu")
    document = read_json(tmp_path / "out" / "finetune.json")
    assert document == json.loads(json.dumps(report.document()))
    scored = {row["volume_id"] for row in document["rows"]}
    assert len(document["rows"]) == 2 * 2 * len(ORGANS) * len(scored) and volumes[0].volume_id not in scored
    assert document["budget"] == {
        "steps": 2,
        "batch": 1,
        "lr": 3e-3,
        "warmup": 0.1,
        "seeds": 2,
        "half_resolution": False,
    }
    assert report.table()[0].row_count == len(ORGANS) + 1 and set(document["mean"]) == {"pretrained", "scratch"}
    state = load_file(tmp_path / "out" / "segmenter.safetensors")
    assert set(state) == set(_start(load_run(run), "scratch", len(ORGANS), 0, FinetuneBudget()).state_dict())
    once = FinetuneBudget(steps=2, batch=1, seeds=1)
    again = finetune(run, store.path, labels_dir, tmp_path / "again", budget=once, device="cpu")
    assert again.rows == [row for row in report.rows if row["seed"] == 0]


def test_a_patient_that_was_trained_on_is_not_scored_unasked(world, tmp_path):
    store, labels_dir, volumes, run, *_ = world
    (tmp_path / "one").mkdir()
    shutil.copy(labels_dir / f"{volumes[0].volume_id}.nii.gz", tmp_path / "one")
    with pytest.raises(UsageError, match="--include-trained"):
        finetune(run, store.path, tmp_path / "one", tmp_path / "out", device="cpu")
    budget = FinetuneBudget(steps=1, batch=1, seeds=1)
    report = finetune(
        run, store.path, tmp_path / "one", tmp_path / "out", budget=budget, device="cpu", include_trained=True
    )
    assert "optimistic" in report.notes[-1]


def test_a_copy_of_another_store_s_training_scan_is_not_scored(world, tmp_path):
    store, labels_dir, volumes, _, reader, _ = world
    elsewhere = make_store(tmp_path / "elsewhere", [], superpatch=32)
    hu = reader.read_region(volumes[1].volume_id, (0, 0, 0), volumes[1].shape)
    add_volume(elsewhere, hu, name="copy", group="copy", spacing=SPACING)
    split = Split(("copy", "patient-0", "patient-2"), ())
    run = save_run(tmp_path / "run", split, replace(SMALL, crop=CROP))
    record_scans(run, [elsewhere], split)
    budget = FinetuneBudget(steps=1, batch=1, seeds=1)
    report = finetune(run, store.path, labels_dir, tmp_path / "out", budget=budget, device="cpu")
    assert {row["volume_id"] for row in report.rows} == {volumes[3].volume_id}


def test_outside_the_scan_and_beyond_the_volume_nothing_is_labelled(tmp_path):
    shape = (32, 32, 24)
    valid, truth = np.ones(shape, bool), np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    valid[:8, 16:] = False
    store = make_store(tmp_path / "s", [])
    volume = add_volume(store, np.full(shape, 40, np.int16), valid=valid)
    np.save(tmp_path / "labels.npy", truth)
    labels = Labels(("a", "b"), (volume,), (), {volume.volume_id: tmp_path / "labels.npy"})
    _, found = _batch(SuperpatchReader(store), labels, [Place(volume, (0, 0, 0))], 32)
    expected = np.full((32, 32, 32), UNLABELLED)
    expected[:, :, :24] = np.where(valid, truth, UNLABELLED)
    assert np.array_equal(found[0].numpy(), expected)


def test_steps_of_fine_tuning_are_those_of_their_definition(world):
    """AdamW, the rate of this very step, gradients clipped to 1."""
    _, _, volumes, run, reader, labels = world
    places = (Place(volumes[1], INSIDE), Place(volumes[1], (16, 16, 16)))
    budget = FinetuneBudget(steps=20, batch=1, lr=0.01)
    ours = _start(load_run(run), "scratch", len(ORGANS), 0, FinetuneBudget())
    torch.nn.init.normal_(ours.classify[-1].weight, generator=torch.Generator().manual_seed(0))  # steep
    theirs = copy.deepcopy(ours)
    for _ in islice(train_segmenter(ours, reader, labels, Task(places, (), ""), budget, 3), 4):
        pass
    optimizer, parameters = torch.optim.AdamW(theirs.parameters(), weight_decay=0.01), list(theirs.parameters())
    for step, rate in enumerate((0.5, 1.0, 1.0, (1 + np.cos(np.pi / 18)) / 2)):  # two steps up, 18 down
        optimizer.param_groups[0]["lr"] = 0.01 * rate
        hu, truth = _batch(reader, labels, _draw(places, places, 3, step, 1), CROP)
        gradients = torch.autograd.grad(segmentation_loss(theirs(hu), truth), parameters)
        norm = sum(one.square().sum() for one in gradients).sqrt()
        assert norm > 1, "nothing was clipped: this test shows less than it says"
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / norm
        optimizer.step()
    for (name, mine), other in zip(ours.named_parameters(), parameters, strict=True):
        if not name.endswith("qkv.bias"):  # that of keys has no gradient but rounding
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_class_scored_in_one_volume_is_noted():
    rows = [
        {"volume_id": volume, "class": name, "dice": dice}
        for volume, name, dice in [("v", "x", 0.5), ("w", "x", 0.1), ("v", "y", 0.7), ("w", "y", None)]
    ]
    assert list(_rare(rows, ["x", "y"])) == ["y is scored in one of the 2 volumes alone: says little of new patients"]
    assert not list(_rare(rows[::2], ["x", "y"]))


def test_what_is_cut_off_leaves_no_results(world, tmp_path, monkeypatch):
    store, labels_dir, _, run, *_ = world
    turns = []

    def second_is_interrupted(*given):
        turns.append(1)
        if len(turns) == 2:
            raise KeyboardInterrupt
        return score_segmenter(*given)

    monkeypatch.setattr("maesil.downstream.finetune.score_segmenter", second_is_interrupted)
    budget = FinetuneBudget(steps=1, batch=1, seeds=1)
    with pytest.raises(KeyboardInterrupt):
        finetune(run, store.path, labels_dir, tmp_path / "out", budget=budget, device="cpu")
    assert list((tmp_path / "out").iterdir()) == []
