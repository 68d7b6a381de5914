"""Stacks side by side, centres that jump, and places looked at over and over: by positions, before any pixel."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.headers import header, straight

from maesil.ingest.series import outcomes_of_series
from maesil.ingest.slice_places import cut_at_jumps, is_time_series, side_by_side


@settings(max_examples=40, deadline=None)
@given(
    aside=st.tuples(st.floats(-150, 150), st.floats(-150, 150)),
    tilt=st.sampled_from([0.0, 0.0, 0.3]),
    starts=st.integers(0, 10),
    seed=st.integers(0, 1000),
)
def test_stacks_side_by_side_are_told_apart_by_their_places_alone(aside, tilt, starts, seed):
    if np.hypot(*aside) < 8.0:  # tilted by more than that from place to place
        return
    left = [header(k, (0, tilt * 2.0 * k, 2.0 * k)) for k in range(30)]
    right = [header(100 + k, (aside[0], aside[1] + tilt * 2.0 * k, 2.0 * k)) for k in range(starts, 30)]
    slices = left + right
    random.Random(seed).shuffle(slices)
    found = [sorted(h.path.name for h in stack) for _, stack in side_by_side(slices)]
    assert sorted(found) == sorted(sorted(h.path.name for h in part) for part in (left, right))
    assert all(outcome.stack for outcome in outcomes_of_series(slices))


def test_one_stack_has_nothing_beside_it():
    assert side_by_side([header(k, (0, 0.3 * k, 2.0 * k)) for k in range(30)]) == []
    assert side_by_side([*straight(20), *straight(20)]) == []  # several at one place are another matter


@pytest.mark.parametrize("jump", [(5.0, 0.0, 0.0), (0.0, -0.4, 0.9), (12.0, 3.0, 60.0)])
def test_a_centre_that_jumps_makes_two_volumes(jump):
    below = straight(20)
    above = [header(100 + k, np.add((0, 0, 40.0 + 2 * k), jump)) for k in range(17)]
    outcomes = outcomes_of_series([*below, *above])
    assert [len(outcome.stack.slices) for outcome in outcomes] == [20, 17]
    assert [len(part) for _, part in cut_at_jumps([*below, *above])] == [20, 17]


def test_a_few_slices_behind_a_jump_are_refused():
    slices = [*straight(20), *(header(100 + k, (5, 0, 40.0 + 2 * k)) for k in range(5))]
    assert [outcome.refusal.code for outcome in outcomes_of_series(slices)] == ["drift"]


def monitoring(count: int, places: int = 1, **more) -> list:
    return [
        header(k, (0, 0, 5.0 * (k % places)), acquisition=(str(k), "120", "B40", "", ""), **more) for k in range(count)
    ]


@pytest.mark.parametrize(("count", "places"), [(20, 1), (60, 2), (240, 8)])
def test_places_looked_at_over_time_are_no_volume(count, places):
    slices = monitoring(count, places)
    assert is_time_series(slices)
    (outcome,) = outcomes_of_series(slices)
    assert (outcome.status, outcome.refusal.code) == ("skipped", "time_series")


def test_slices_written_at_one_place_are_no_time_series():
    """Nothing tells instants apart, or the header speaks of several places: positions were lost."""
    assert not is_time_series([header(k, (0, 0, 0)) for k in range(30)])
    assert not is_time_series([h for k in range(30) for h in monitoring(1, slice_location=f"{k}")])


def test_two_phases_are_no_time_series():
    assert not is_time_series([header(k, (0, 0, 2.0 * (k % 20))) for k in range(40)])
