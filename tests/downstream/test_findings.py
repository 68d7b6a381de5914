"""What may be said: no claim without enough patients and an interval that leaves zero out."""

from __future__ import annotations

import pytest

from maesil.downstream.findings import LEAST_PATIENTS, chance, findings, limits, verdict_of
from maesil.downstream.scored import EVERYWHERE, SHUFFLED, Row, Rows
from maesil.evaluation.intervals import Difference


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (Difference(0.1, 0.01, 0.2, 6), "helps"),
        (Difference(0.1, 0.01, 0.2, 5), "too few"),
        (Difference(-0.1, -0.2, -0.01, 60), "harms"),
        (Difference(0.1, -0.01, 0.2, 60), "undecided"),
        (Difference(0.1, 0.0, 0.2, 60), "undecided"),
        (None, "too few"),
    ],
)
def test_verdicts(difference, verdict):
    assert verdict_of(difference) == verdict


def test_fewer_patients_than_the_least_could_all_agree_by_chance():
    assert 2 * 0.5**LEAST_PATIENTS < 0.05 < 2 * 0.5 ** (LEAST_PATIENTS - 1)


def world(patients: int, ahead: float) -> Rows:
    names = [f"p{number}" for number in range(patients)]
    scores = {"mine": 0.7 + ahead, "untrained": 0.7, "voxels": 0.7, SHUFFLED: 0.5}
    rows = [
        Row("presence_auroc", who, p, s + n / 100, "liver") for who, s in scores.items() for n, p in enumerate(names)
    ]
    rows = [row if row.encoder != SHUFFLED else Row(row.score, row.encoder, row.patient, 0.5, "liver") for row in rows]
    starts = {"mine": 0.5 + ahead, "scratch": 0.5, "mine, frozen": 0.4, "untrained, frozen": 0.4}
    return Rows([*rows, *(Row("dice", who, p, s, "liver", 2, 0, 10) for who, s in starts.items() for p in names)])


def test_what_is_ahead_helps_and_what_is_level_is_undecided():
    told = [one.told() for one in findings(world(8, 0.1), "mine")]
    assert len(told) == 4
    assert "pre-training helps by +0.100 [+0.100, +0.100], 8 patients" in told[0]
    assert "mine against voxels: the encoder helps" in told[1]
    assert "learnt from 2 patients: mine against scratch: pre-training helps" in told[2]
    assert "no difference could be shown with 8 patients" in told[3]
    told = [one.told() for one in findings(world(8, -0.1), "mine")]
    assert "pre-training harms by -0.100" in told[0]


def test_few_patients_and_validation_patients_are_said():
    rows = world(3, 0.1)
    found = findings(rows, "mine")
    assert {one.verdict for one in found} == {"too few"} and "3 patients are too few" in found[0].told()
    said = " ".join(limits(found, "validation"))
    assert "choices may rest on them" in said and "4 of 4 comparisons rest on fewer than 6" in said
    assert "choices may rest" not in " ".join(limits(found, "test"))
    alone = findings(world(1, 0.1), "mine")
    assert "nothing can be said" in alone[0].told()


def test_shuffled_labels_that_score_are_a_warning():
    row = Row("presence_auroc", SHUFFLED, "p", 0.5, "liver")
    assert all("as it must be" in one for one in chance(Rows([row])))
    (told,) = chance(Rows([Row("share_r2", SHUFFLED, "p", 0.3, "liver")]))
    assert "WARNING" in told


def test_a_segmentation_taught_with_shuffled_labels_is_held_against_the_organ_everywhere():
    def rows(dice):
        at = {"organ": "liver", "shots": 4, "step": 10}
        return Rows([
            Row("dice", name, f"p{n}", value, **at)
            for name, value in ((SHUFFLED, dice), (EVERYWHERE, 0.1))
            for n in range(4)
        ])  # fmt: skip

    (well,), (warned,) = chance(rows(0.08)), chance(rows(0.4))
    assert well == "Dice, learnt from 4 patients: shuffled labels score 0.080, chance is at most 0.1, as it must be."
    assert "0.400" in warned and "WARNING" in warned
