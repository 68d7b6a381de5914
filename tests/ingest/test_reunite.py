"""One series UID under several identities, and single slices under a series UID each."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.headers import header, straight

from maesil.ingest.header import InstanceHeader
from maesil.ingest.reunite import Planned, outcomes_of_all


def stacks(planned: Planned) -> list[tuple[str, ...]]:
    """For each volume: the patients of its slices."""
    found = [outcome.stack for _, outcome in planned.outcomes if outcome.stack]
    return [tuple(sorted({h.patient for h in stack.slices if h})) for stack in found]


def codes(planned: Planned) -> set[str]:
    return {outcome.refusal.code for _, outcome in planned.outcomes if outcome.refusal}


def all_files_once(planned: Planned, slices: list[InstanceHeader]) -> bool:
    paths = [path for _, outcome in planned.outcomes for path in outcome.paths]
    return sorted(paths) == sorted(h.path for h in slices)


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(20, 60), names=st.lists(st.sampled_from("ab"), min_size=60, max_size=60), end_to_end=st.booleans()
)
def test_one_regular_stack_of_one_series_is_one_patient(count, names, end_to_end):
    """Unless the slices of two lie between one another and each is a scan by itself."""
    names = sorted(names[:count]) if end_to_end else names[:count]
    slices = [replace(h, patient=name) for h, name in zip(straight(count), names, strict=True)]
    random.Random(count).shuffle(slices)
    planned = outcomes_of_all(slices)
    assert all_files_once(planned, slices)
    if not end_to_end and not stacks(planned):
        assert codes(planned) == {"several_owners"}
        return
    assert stacks(planned) == [tuple(sorted(set(names)))]
    assert len({planned.patients.get(name, name) for name in names}) == 1


def test_every_spelling_leads_to_one_patient():
    planned = Planned()
    for names in (["b", "c"], ["a", "b"], ["", "d"], ["e", "d"]):
        planned.same_patient(names)
    assert {planned.patients[name] for name in "abc"} == {"a"}
    assert {planned.patients[name] for name in ("", "d", "e")} == {"d"}


@pytest.mark.parametrize("start", [0.0, 100.0, 500.0])
def test_whole_stacks_at_places_of_their_own_stay_with_their_patients(start):
    other = [header(100 + k, (0, 0, start + 2.6 * k), patient="q") for k in range(20)]
    slices = [*straight(20), *other]
    planned = outcomes_of_all(slices)
    assert sorted(stacks(planned)) == [("p",), ("q",)] and all_files_once(planned, slices)
    assert not planned.patients


def test_a_slice_missing_where_the_name_changes_is_missed():
    slices = [replace(h, patient="q" if k > 30 else "p") for k, h in enumerate(straight(40)) if k != 33]
    assert codes(outcomes_of_all(slices)) == {"gap"}


def anew(slices: list[InstanceHeader], **more) -> list[InstanceHeader]:
    return [replace(h, series=f"1.9.{h.path.name}", **more) for h in slices]


def test_single_slices_that_make_one_stack_are_one_series():
    slices = anew(straight(30), acquisition=("1", "120", "B40", "", "", "", "", "2"))
    planned = outcomes_of_all([*slices, *[replace(h, series="7") for h in straight(5)]])
    ((patients,),) = [stacks(planned)]
    assert patients == ("p",)
    (stack,) = [outcome.stack for _, outcome in planned.outcomes if outcome.stack]
    assert "series_reunited" in stack.notes and len(stack.slices) == 30
    assert codes(planned) == {"too_few_slices"}


@pytest.mark.parametrize("differs", ["patient", "image_type", "technical", "frame_of_reference", "pixel_spacing"])
def test_slices_that_differ_in_more_are_not_one_series(differs):
    values = {
        "patient": ("p", "q"),
        "image_type": (("A",), ("B",)),
        "technical": ({"KVP": 100.0}, {"KVP": 120.0}),
        "frame_of_reference": ("1.5", "1.6"),
        "pixel_spacing": ((1.0, 1.0), (0.5, 0.5)),
    }[differs]
    slices = [replace(h, **{differs: values[k % 2]}) for k, h in enumerate(anew(straight(30)))]
    planned = outcomes_of_all(slices)
    assert not stacks(planned) and all_files_once(planned, slices)


def test_short_series_are_series_of_their_own():
    slices = [replace(h, series=f"1.9.{k // 3}") for k, h in enumerate(straight(30))]
    assert codes(outcomes_of_all(slices)) == {"too_few_slices"}
