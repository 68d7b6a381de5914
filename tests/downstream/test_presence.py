"""Organ presence: what counts as present, what each crop's features are of, and that only knowledge scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.labelled import labelled_store
from support.runs import SMALL

from maesil.downstream.labels import load_labels
from maesil.downstream.presence import PRESENT_ABOVE, Crops, look_at_crops, pool, score_presence
from maesil.downstream.scored import SHUFFLED, Rows
from maesil.models.encoders import untrained_encoder
from maesil.store.reader import SuperpatchReader
from maesil.types import Intensity

pytestmark = pytest.mark.usefixtures("one_thread")


def made_crops(patients: int = 12, crops: int = 24, seed: int = 0) -> Crops:
    """Crops whose features hold the answer (``knowing``), or nothing (``noise``, ``other noise``)."""
    rng = np.random.default_rng(seed)
    patient = np.repeat([f"p{n:02}" for n in range(patients)], crops)
    present = rng.random((len(patient), 2)) < (0.5, 0.2)
    noise = rng.normal(size=(len(patient), 6)).astype(np.float32)
    knowing = (noise + present @ rng.normal(size=(2, 6)) * 4).astype(np.float32)
    other = rng.normal(size=(len(patient), 6)).astype(np.float32)
    return Crops(patient, patient, present, {"knowing": knowing, "noise": noise, "other noise": other})


def test_an_encoder_that_holds_the_answer_wins_and_shuffled_labels_are_at_chance():
    crops = made_crops()
    names = sorted(set(crops.patient_N))
    rows = Rows(list(score_presence(crops, ("a", "b"), names[:6], names[6:], "knowing", 0)))
    assert rows.mean("presence_auroc", "knowing") > 0.95
    assert all(abs(rows.mean("presence_auroc", name) - 0.5) < 0.1 for name in ("noise", "other noise"))
    assert abs(rows.mean("presence_auroc", SHUFFLED) - 0.5) < 0.1
    assert rows.difference("presence_auroc", "knowing", "noise").low > 0.2
    undecided = rows.difference("presence_auroc", "noise", "other noise")
    assert undecided.low < 0 < undecided.high
    assert {row.patient for row in rows.rows} == set(names[6:])


def test_what_cannot_be_learnt_or_scored_has_no_row():
    crops = made_crops()
    crops.present_NK[:, 1] = False
    crops.present_NK[crops.patient_N == "p07", 0] = True
    names = sorted(set(crops.patient_N))
    rows = list(score_presence(crops, ("a", "b"), names[:6], names[6:], "knowing", 0))
    assert {row.organ for row in rows} == {"a"}
    assert {row.patient for row in rows} == set(names[6:]) - {"p07"}


def test_crops_are_those_of_the_grid_with_what_they_hold(tmp_path):
    store, labels_dir, volumes = labelled_store(tmp_path, 2)
    labels = load_labels(labels_dir, volumes, tmp_path / "scratch")
    encoder = untrained_encoder(SMALL, Intensity(mean=0.4, std=0.3), 0)
    of = {volume.volume_id: volume.group for volume in volumes}
    reader = SuperpatchReader(store)
    crops = look_at_crops(reader, labels, {"mine": encoder}, of)
    # 48 x 34 x 48 voxels: the grid of 32^3 crops reaches two voxels into a second row, and a crop needs some body.
    assert set(crops.patient_N) == {"patient-0", "patient-1"} and set(crops.pooled) == {"mine", "voxels"}
    whole = np.asarray(labels.of(volumes[0]))
    counts = [(whole[:32, :32, :32] == k).sum() for k in range(1, 5)]
    first = crops.present_NK[crops.volume_N == volumes[0].volume_id][0]
    assert first.tolist() == [count > PRESENT_ABOVE for count in counts] and first.any()
    hu = torch.from_numpy(reader.read_region(volumes[0].volume_id, (0, 0, 0), (32, 32, 32)))[None]
    with torch.no_grad():
        tokens = encoder(hu)[0].numpy()
    expected = np.concatenate([tokens.mean(axis=0), tokens.std(axis=0)])
    mine = crops.pooled["mine"][crops.volume_N == volumes[0].volume_id][0]
    np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-4)
    assert crops.pooled["voxels"].shape[1] == 2 * 512


def test_pooled_is_the_mean_and_the_deviation_of_each_channel():
    tokens = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    np.testing.assert_allclose(pool(tokens), [2.0, 0.0, 1.0, 0.0])


def test_only_patients_asked_for_are_learnt_from():
    crops = made_crops()
    some = crops.of(["p00", "p03"])
    assert set(some.patient_N) == {"p00", "p03"} and len(some.pooled["noise"]) == 48 == len(some.present_NK)
    spoilt = made_crops()
    spoilt.pooled["knowing"][spoilt.patient_N == "p05"] *= -9
    rows = [list(score_presence(one, ("a", "b"), ["p00", "p01"], ["p02"], "knowing", 0)) for one in (crops, spoilt)]
    assert rows[0] == rows[1]
