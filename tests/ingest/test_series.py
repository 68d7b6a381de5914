"""Stacks are made of positions and orientations alone (headers only; files with pixels: test_hard_dicom)."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.headers import header, straight

from maesil.documents import canonical_json
from maesil.geometry import shear_mm, world_of
from maesil.ingest.header import InstanceHeader
from maesil.ingest.passes import MIN_SLICES
from maesil.ingest.reunite import group_series, outcomes_of_all
from maesil.ingest.series import outcomes_of_series
from maesil.ingest.stack import Outcome


@st.composite
def stacks(draw) -> tuple[list[InstanceHeader], np.ndarray, np.ndarray]:
    """A regular stack of any orientation, spacing and gantry tilt, in any order; its first position and its step."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    row, column = turn[:, 0], turn[:, 1]
    normal = np.cross(row, column)
    gap = rng.uniform(0.3, 8)
    step = gap * normal + draw(st.sampled_from([0.0, 0.0, np.tan(np.radians(18))])) * gap * column
    first = rng.uniform(-500, 500, 3)
    count = draw(st.integers(MIN_SLICES, 60))
    jitter = draw(st.sampled_from([0.0, 1e-6, 1e-3]))
    slices = [header(k, first + k * step + rng.uniform(-jitter, jitter, 3), [*row, *column]) for k in range(count)]
    random.Random(int(rng.integers(1000))).shuffle(slices)
    return slices, first, step


def one(outcomes: list[Outcome]) -> Outcome:
    (outcome,) = outcomes
    return outcome


@settings(max_examples=50, deadline=None)
@given(stacks())
def test_any_regular_stack_is_one_volume_in_the_order_of_positions(stack):
    slices, _, step = stack
    made = one(outcomes_of_series(slices)).stack
    assert made is not None
    assert [int(h.path.name) for h in made.slices] == list(range(len(slices)))
    for k, found in enumerate(made.slices):
        np.testing.assert_allclose(world_of(made.affine, [k, 0, 0]), found.position, atol=5e-3)
    tilted = abs(np.dot(step, made.affine[:3, 1])) > 1e-6
    assert (shear_mm(made.affine, (len(slices), 64, 48)) > 0.3) == tilted


@settings(max_examples=40, deadline=None)
@given(stacks(), st.data())
def test_missing_slices_are_listed(stack, data):
    slices, _, _ = stack
    count = len(slices)
    missing = data.draw(st.sets(st.integers(1, count - 2), min_size=1, max_size=max(1, min(4, count - MIN_SLICES))))
    left = [h for h in slices if int(h.path.name) not in missing]
    outcome = one(outcomes_of_series(left))
    if len(left) < MIN_SLICES:
        assert (outcome.status, outcome.refusal.code) == ("skipped", "too_few_slices")
        return
    assert (outcome.status, outcome.refusal.code) == ("quarantined", "gap")
    assert sum(outcome.refusal.numbers["missing"]) == len(missing)
    runs = sum(k - 1 not in missing for k in missing)
    assert len(outcome.refusal.numbers["missing"]) == runs
    canonical_json(outcome.refusal.numbers)
    assert sorted(outcome.paths) == sorted(h.path for h in left)


@settings(max_examples=30, deadline=None)
@given(stacks(), st.integers(2, 13), st.floats(0.02, 0.45))
def test_a_slice_out_of_step_is_refused(stack, k, share):
    slices, first, step = stack
    moved = [header(k, first + (k + share) * step, h.orientation) if int(h.path.name) == k else h for h in slices]
    gap = abs(np.dot(step, np.cross(slices[0].orientation[:3], slices[0].orientation[3:])))
    outcome = one(outcomes_of_series(moved))
    if gap * share < min(0.085, 0.4 * gap):  # as far off as rounding to a tenth of a millimetre leads
        assert outcome.stack is not None
        return
    if gap * share < min(0.12, 0.6 * gap):  # the straight line through all slices gives way to the one
        return
    assert outcome.stack is None and outcome.refusal.code in ("irregular_spacing", "drift")
    canonical_json(outcome.refusal.numbers)


@settings(max_examples=30, deadline=None)
@given(stacks(), st.integers(1, 14))
def test_a_slice_aside_is_refused(stack, k):
    slices, first, step = stack
    aside = np.asarray(slices[0].orientation[:3]) * max(0.6, 0.2 * np.linalg.norm(step))
    moved = [header(k, first + k * step + aside, h.orientation) if int(h.path.name) == k else h for h in slices]
    outcome = one(outcomes_of_series(moved))
    assert outcome.stack is None and outcome.refusal.code == "drift"
    canonical_json(outcome.refusal.numbers)


@pytest.mark.parametrize("count", [1, MIN_SLICES - 1])
def test_too_few_slices_are_skipped(count):
    outcome = one(outcomes_of_series(straight(count)))
    assert (outcome.status, outcome.refusal.code) == ("skipped", "too_few_slices")


def test_two_planes_are_two_volumes_with_labels_that_do_not_depend_on_order():
    axial = straight(20)
    coarse = straight(20, pixel_spacing=(1.4, 1.6))
    for slices in (axial + coarse, coarse + axial, sorted(axial + coarse, key=lambda h: h.position)):
        outcomes = outcomes_of_series(slices)
        assert len(outcomes) == 2 and all(o.stack for o in outcomes)
        assert len({o.label for o in outcomes}) == 2
    first = {o.label for o in outcomes_of_series(axial + coarse)}
    assert first == {o.label for o in outcomes_of_series(coarse + axial)}


def test_two_acquisitions_at_other_positions_are_one_regular_stack_or_two():
    """A scan stitched of two acquisitions is one volume when its steps stay regular."""
    slices = straight(20) + [
        header(20 + k, (0, 0, 40 + 2.0 * k), acquisition=("2", "120", "B40", "", "")) for k in range(20)
    ]
    assert len(one(outcomes_of_series(slices)).paths) == 40


def test_blocks_far_apart_are_two_volumes():
    outcomes = outcomes_of_series(straight(20) + [header(100 + k, (0, 0, 300 + 2.0 * k)) for k in range(20)])
    assert [len(o.paths) for o in outcomes] == [20, 20] and all(o.stack for o in outcomes)
    assert len({o.label for o in outcomes}) == 2


@pytest.mark.parametrize("gap", [(2.0, 2.05), (1.0, 3.0)])
def test_spacing_that_changes_half_way_is_refused(gap):
    z = np.cumsum([gap[0]] * 15 + [gap[1]] * 15)
    outcome = one(outcomes_of_series([header(k, (0, 0, at)) for k, at in enumerate(z)]))
    assert outcome.refusal.code in ("irregular_spacing", "gap")


@pytest.mark.parametrize("missing", ["position", "orientation", "pixel_spacing"])
def test_one_slice_without_geometry_takes_its_series_along(missing):
    slices = straight(30)
    slices[7] = replace(slices[7], **{missing: None})
    outcomes = outcomes_of_series(slices)
    assert {o.status for o in outcomes} == {"quarantined"}
    assert sorted(o.refusal.code for o in outcomes) == ["incomplete_series", "no_geometry"]
    assert sorted(p for o in outcomes for p in o.paths) == sorted(h.path for h in slices)


@pytest.mark.parametrize(
    "more",
    [
        {"orientation": (0, 0, 0, 0, 0, 0)},
        {"orientation": (1, 0, 0, 1, 0, 0)},
        {"orientation": (1.2, 0, 0, 0, 1, 0)},
        {"orientation": (1, 0, 0, 0, 1.2, 0)},
        {"orientation": (1.2, 0, 0, 0, 1 / 1.2, 0)},
        {"orientation": (1, 0, 0, 0.5, 0.8, 0)},
        {"pixel_spacing": (0.0, 0.7)},
        {"pixel_spacing": (-0.7, 0.7)},
        {"pixel_spacing": (700.0, 0.7)},
        {"rows": 0},
        {"rows": 65535, "columns": 65535},
    ],
    ids=str,
)
def test_impossible_headers_are_quarantined(more):
    for outcome in outcomes_of_series(straight(30, **more)):
        assert outcome.status == "quarantined" and outcome.stack is None


def test_localizers_and_reformats_are_skipped_and_the_rest_kept():
    scout = header(90, (0, 0, 0), image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    coronal = header(91, (0, 0, 0), (1, 0, 0, 0, 0, -1), image_type=("DERIVED", "SECONDARY", "MPR"))
    outcomes = outcomes_of_series([scout, *straight(20), coronal])
    codes = {o.refusal.code: o.status for o in outcomes if o.refusal}
    assert codes == {"localizer": "skipped", "derived_reformat": "skipped"}
    assert len([o for o in outcomes if o.stack]) == 1


def test_all_positions_equal_without_pixels_to_read_never_ends_the_run(tmp_path):
    slices = [header(k, (0, 0, 0), path=tmp_path / f"missing {k}") for k in range(20)]
    try:
        outcomes = outcomes_of_series(slices)
    except OSError as error:  # the files went away between scan and plan
        pytest.fail(f"a vanished file must be a refusal of its series, not {error!r}")
    assert all(o.stack is None for o in outcomes)


def test_groups_never_mix_patients_studies_or_series():
    base = straight(2)
    others = [header(10, (0, 0, 0), patient="q"), header(11, (0, 0, 0), study="1.9"), header(12, (0, 0, 0), series="1")]
    groups = group_series([*base, *others, header(13, (0, 0, 0), series="", path=Path("/a/1"))])
    assert sorted(len(slices) for owners in groups.values() for slices in owners.values()) == [1, 1, 1, 2]


def blank(slices: list[InstanceHeader], folder: str) -> list[InstanceHeader]:
    return [replace(h, series="", path=Path(folder) / h.path.name) for h in slices]


def test_blank_series_are_told_apart_by_their_folders_and_joined_only_to_become_whole():
    slices = straight(40)
    apart = outcomes_of_all(blank(straight(20), "/a") + blank(straight(20, start=7.3), "/b"))
    assert [len(o.stack.slices) for _, o in apart.outcomes] == [20, 20]
    joined = outcomes_of_all(blank(slices[0:9], "/a") + blank(slices[9:28], "/b") + blank(slices[28:], "/c"))
    assert [len(o.stack.slices) for _, o in joined.outcomes] == [40]
    holed = outcomes_of_all(blank(slices[0:20], "/a") + blank(slices[21:], "/b"))
    assert [len(o.stack.slices) for _, o in holed.outcomes] == [20, 19]
