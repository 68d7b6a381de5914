"""Means and differences are taken over patients, and only at the last step."""

from __future__ import annotations

import pytest

from maesil.downstream.scored import Row, Rows, by_patient


def test_organs_weigh_alike_within_a_patient_and_patients_weigh_alike():
    rows = [
        Row("dice", "a", "one", 0.2, "liver", 1, 0, 9),
        Row("dice", "a", "one", 0.4, "liver", 1, 1, 9),
        Row("dice", "a", "one", 0.9, "lung", 1, 0, 9),
        Row("dice", "a", "two", 0.0, "liver", 1, 0, 9),
    ]
    assert by_patient(rows) == pytest.approx({"one": 0.6, "two": 0.0})
    assert Rows(rows).mean("dice", "a", 1) == pytest.approx(0.3)
    assert Rows(rows).mean("dice", "a", 2) is None and Rows(rows).mean("surface_dice", "a", 1) is None


def test_what_was_scored_on_the_way_does_not_count():
    rows = [Row("dice", "a", "one", 0.1, "liver", 1, 0, 5), Row("dice", "a", "one", 0.7, "liver", 1, 0, 10)]
    assert Rows(rows).mean("dice", "a", 1) == 0.7


def test_differences_are_of_the_patients_that_both_have():
    ours = [Row("other_scan", "a", name, value) for name, value in (("x", 1.0), ("y", 0.5), ("z", 0.0))]
    theirs = [Row("other_scan", "b", name, value) for name, value in (("x", 0.5), ("y", 0.25))]
    rows = Rows([*ours, *theirs])
    found = rows.difference("other_scan", "a", "b")
    assert found.mean == pytest.approx(0.375) and found.patients == 2 and 0.25 <= found.low <= found.high <= 0.5
    assert Rows(ours).difference("other_scan", "a", "b") is None
    assert (rows.encoders(["other_scan"]), rows.shots()) == (["a", "b"], [])
