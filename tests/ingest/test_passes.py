"""Pixels decide only where headers do not: how many slices are decoded to plan, and that the plan is the same."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.ct_cases import renew_uid, series
from support.ct_phantom import base_affine, sample
from support.headers import header

from maesil.ingest.options import IngestOptions
from maesil.ingest.passes import Positions, decoded_here
from maesil.ingest.plan import make_plan
from maesil.ingest.run import ingest
from maesil.ingest.scan import scan
from maesil.ingest.stack import SeriesRules
from maesil.store.recipe import Recipe
from maesil.synthetic.dicom import save_all

PHASES, SHAPE = 6, (60, 16, 16)


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """Six phases of 60 slices in one series; all of them share their lowest slice, which is air."""
    folder, slices = tmp_path_factory.mktemp("phases"), []
    hu = sample(base_affine(), SHAPE)
    for phase in range(PHASES):
        inside = hu + 20.0 * phase
        inside[0] = -1000.0
        for data in series("p", SHAPE, hu=inside):
            renew_uid(data, phase)
            data.AcquisitionNumber = phase + 1
            slices.append(data)
    save_all(folder, slices)
    return folder


def planned(folder):
    """Return a plan and the files that were decoded for it, each as often as it was."""
    decoded = []

    def counting(slices):
        decoded.extend(one.path for one in slices)
        return decoded_here(slices)

    return make_plan(scan([folder]), SeriesRules(digests=counting)), decoded


def test_phases_that_headers_tell_apart_are_decoded_at_one_position_alone(phases):
    plan, decoded = planned(phases)
    assert [len(one.source.paths) for one in plan.volumes] == [SHAPE[0]] * PHASES and not plan.refused
    assert len(decoded) == PHASES


def test_a_regular_series_is_not_decoded_to_plan_it(tmp_path):
    save_all(tmp_path, series("p", SHAPE))
    plan, decoded = planned(tmp_path)
    assert len(plan.volumes) == 1 and decoded == []


def test_a_series_that_is_there_twice_is_compared_whole_once_and_on_workers(tmp_path):
    """Every slice has a copy under another acquisition number: headers alone would call that two phases."""
    slices = series("p", SHAPE)
    again = deepcopy(slices)
    for data in again:
        renew_uid(data, "again")
        data.AcquisitionNumber = 2
    save_all(tmp_path / "in", [*slices, *again])
    plan, decoded = planned(tmp_path / "in")
    assert len(plan.volumes) == 1 and sum(v.code == "duplicate_slice" for v in plan.verdicts) == SHAPE[0]
    assert len(decoded) == len(set(decoded)) == 2 * SHAPE[0]

    told = []
    options = IngestOptions(workers=0, dry_run=True)
    summary = ingest([tmp_path / "in"], tmp_path / "out", Recipe(), options, lambda *stage: told.append(stage))
    assert len(summary.planned) == 1
    compared = [(done, total) for stage, done, total in told if stage == "compare"]
    assert compared == [(n + 1, 2 * SHAPE[0] - 2) for n in range(2 * SHAPE[0] - 2)]  # two were decoded before


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=9), st.data())
def test_the_answer_is_that_of_decoding_everything(pixels, data):
    """The list holds the pixels of each position's slices."""
    part = [header(10 * n + k, (0, 0, n)) for n, same in enumerate(pixels) for k in range(len(same))]
    part = data.draw(st.permutations(part))
    content = {id(one): bytes([pixels[int(one.path.name) // 10][int(one.path.name) % 10]]) for one in part}
    asked = []

    def digests(slices):
        asked.extend(slices)
        return {id(one): content[id(one)] for one in slices}

    positions = Positions(part, digests)
    assert positions.conflicts == any(len(set(same)) > 1 for same in pixels)
    assert len(positions.slices) == len(pixels) and len(positions.slices) + len(positions.copies) == len(part)
    some = data.draw(st.lists(st.sampled_from(part), unique_by=id))
    at_place = {}
    for one in some:
        at_place.setdefault(int(one.path.name) // 10, set()).add(content[id(one)])
    assert positions.differ(some) == any(len(found) > 1 for found in at_place.values())
    assert len(asked) == len(set(map(id, asked))), "a slice is decoded once"
