"""The most similar crop and the most similar scan."""

from __future__ import annotations

import numpy as np
import pytest

from maesil.downstream.presence import Crops
from maesil.downstream.retrieval import nearest, overlap, score_other_scan, score_retrieval
from maesil.downstream.scored import SHUFFLED, Rows


def world(seed: int = 0) -> Crops:
    """Eight patients with two scans of eight crops; one encoder knows organs and patients, one knows nothing."""
    rng = np.random.default_rng(seed)
    patient = np.repeat([f"p{n}" for n in range(8)], 16)
    volume = np.array([f"{p}-{n // 8 % 2}" for n, p in enumerate(patient)])
    organ = rng.integers(4, size=len(patient))
    present = np.eye(4, dtype=bool)[organ]
    own = rng.normal(size=(8, 8))[np.repeat(np.arange(8), 16)]
    noise = rng.normal(size=(len(patient), 12)).astype(np.float32)
    knowing = (np.concatenate([3 * present, own], axis=1) + 0.1 * noise).astype(np.float32)
    return Crops(volume, patient, present, {"knowing": knowing, "noise": noise})


def test_who_knows_finds_the_organ_and_the_other_scan_and_who_does_not_finds_what_chance_finds():
    crops, names = world(), [f"p{n}" for n in range(8)]
    rows = Rows([*score_retrieval(crops, names[:4], names[4:], "knowing", 0), *score_other_scan(crops, names[4:])])
    assert rows.mean("retrieval", "knowing") > 0.9
    assert all(0.1 < rows.mean("retrieval", name) < 0.4 for name in ("noise", SHUFFLED))
    assert rows.mean("other_scan", "knowing") == 1.0 and rows.mean("other_scan", "noise") < 0.6
    assert {row.patient for row in rows.rows} == set(names[4:])


def test_patients_of_one_scan_are_not_asked_for_another():
    crops, names = world(), [f"p{n}" for n in range(8)]
    alone = Crops(crops.patient_N, crops.patient_N, crops.present_NK, crops.pooled)
    assert list(score_other_scan(alone, names)) == []


def test_crops_without_any_organ_are_not_asked_about():
    crops = world()
    crops.present_NK[crops.patient_N == "p7"] = False
    rows = list(score_retrieval(crops, ["p0", "p1"], ["p6", "p7"], "knowing", 0))
    assert {row.patient for row in rows} == {"p6"}
    crops.present_NK[:] = False
    assert list(score_retrieval(crops, ["p0"], ["p6"], "knowing", 0)) == []


def test_overlap_is_both_over_either():
    one = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    other = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1]], bool)
    assert overlap(one, other).tolist() == pytest.approx([0.5, 0, 0])


def test_the_nearest_has_the_same_direction_whatever_the_scale_of_a_channel():
    searched = np.array([[1, 1000], [1, -1000], [-1, 1000], [-1, -1000]], np.float32)
    assert nearest(searched, np.array([[5, -200], [-0.1, -90]], np.float32)).tolist() == [1, 3]
