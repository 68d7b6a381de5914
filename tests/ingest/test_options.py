"""What a user may ask for beyond the defaults: each option does its one thing, and is refused when wrong."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from support.ct_cases import CASES, everything
from support.ct_phantom import analytic_hu, base_affine, grid_points, score_world
from support.lanes import slow_but
from support.nifti_cases import CASES as NIFTI_CASES
from support.sources import (
    NATIVE,
    PATIENTS,
    SLICES,
    Workplace,
    contents,
    edit_pixel,
    phantom_hu,
    slices_of,
    write_sources,
)

from maesil.errors import SecurityError, UsageError
from maesil.ingest.options import IngestOptions, parse_partition
from maesil.ingest.phi import findings, patient_words
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series

everything()


@pytest.fixture
def place(tmp_path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("first"))
    write_sources(place.sources)
    place.ingest()
    return place


def build(place: Workplace, *names: str) -> None:
    for name in names:
        CASES[name].build(place.sources / name, f"PATIENT-{name}")


# --- what is accepted belongs to the recipe


@pytest.mark.parametrize("spacing", [None, (2.6, 1.7, 1.3), (2.0, 2.0, 2.0)])
def test_filled_gaps_are_interpolated_and_not_valid(place, spacing):
    build(place, "block_missing")
    recipe = replace(NATIVE, spacing=spacing, fill_gaps=4, superpatch=16)
    (volume,) = place.ingest(recipe=recipe).committed
    assert "gaps_filled" in volume.notes
    reader = SuperpatchReader(place.store)
    hu = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape).astype(float)
    error = np.abs(hu - analytic_hu(grid_points(volume.affine, volume.shape)))
    z = grid_points(volume.affine, volume.shape)[:, 0, 0, 2]
    missing = (z > -804.5 + 8.05 * 2.6) & (z < -804.5 + 12.95 * 2.6)
    assert missing.any() and error[missing].mean() < 25  # the phantom is smooth: a line across 13 mm comes close
    assert (hu[missing] > -1024).mean() > 0.95
    valid = reader.read_map(volume.volume_id, "valid").astype(float) / 255
    assert abs(volume.hu["valid_share"] - (1 - missing.mean())) < 0.07
    assert 0 < valid.mean() < 1
    if spacing is None:
        assert score_world(place.store, volume.volume_id).max_error <= 0.51


def test_gaps_wider_than_allowed_are_refused(place):
    build(place, "block_missing", "spacing_changes")
    summary = place.ingest(recipe=replace(NATIVE, fill_gaps=3))
    assert {v.code for v in summary.files} == {"gap", "irregular_spacing"}


def test_a_doubt_is_accepted_on_purpose_and_noted(place):
    build(place, "windowed_to_8_bit", "constant")
    assert not place.ingest().committed
    (volume,) = place.ingest(
        recipe=replace(NATIVE, accept=("eight_bit", "windowed", "odd_background")), update=True
    ).committed
    assert "accepted_eight_bit" in volume.notes


def test_lossy_is_refused_on_request(place):
    build(place, "jpeg_ls_lossy_without_the_tag", "jpeg_ls")
    summary = place.ingest(recipe=replace(NATIVE, refuse=("lossy",)))
    assert len(summary.committed) == 1
    assert {v.code for v in summary.files if v.status == "quarantined"} == {"lossy"}


def test_reformats_are_taken_on_request(place):
    build(place, "coronal_reformat")
    assert len(place.ingest().committed) == 1
    assert len(place.ingest(recipe=replace(NATIVE, include_derived=True), update=True).volumes) == 2


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_one_form_is_preferred_on_request(place, form):
    place.sources.mkdir()
    NIFTI_CASES["forms_differ_by_a_shift"].build(place.sources)
    (volume,) = place.ingest(recipe=replace(NATIVE, prefer_form=form)).committed
    header = nib.load(next(place.sources.iterdir())).header
    expected = header.get_sform() if form == "sform" else header.get_qform()
    assert volume.affine[2, 3] == pytest.approx(expected[2, 3], abs=1e-3)
    assert f"{form}_preferred" in volume.notes


CHOICES = [
    {"fill_gaps": 2}, {"accept": ("windowed",)}, {"refuse": ("lossy",)}, {"include_derived": True},
    {"prefer_form": "qform"},
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_is_another_recipe_that_survives_its_document(choice):
    recipe = replace(Recipe(), **choice)
    assert recipe.hash != Recipe().hash
    assert Recipe.from_document(json.loads(json.dumps(recipe.document()))) == recipe
    assert not set(choice) & set(Recipe().document())  # what was not asked for leaves no trace


@pytest.mark.parametrize(
    "wrong", [{"fill_gaps": -1}, {"fill_gaps": 99}, {"accept": ("gap",)}, {"refuse": ("x",)}, {"prefer_form": "both"}]
)
def test_wrong_choices_are_usage_errors(wrong):
    with pytest.raises(UsageError, match="expected"):
        replace(Recipe(), **wrong)


# --- how it runs


def test_force_makes_all_anew(first, tmp_path):
    place = first.copy_all(tmp_path)
    summary = place.ingest(force=True)
    assert [v.generation for v in summary.committed] == [2, 2, 2]
    assert contents(place.store) == contents(first.store)


def test_refusals_are_remembered_until_their_code_is_to_be_tried_again(place, monkeypatch):
    import maesil.ingest.run

    build(place, "constant")
    place.ingest()
    built = []
    real = maesil.ingest.run.build
    monkeypatch.setattr(maesil.ingest.run, "build", lambda *a: built.append(a) or real(*a))
    for codes, count in (((), 0), (("gap",), 0), (("constant",), 1), (("all",), 2)):
        assert place.ingest(retry_quarantined=codes).refused_volumes == 1
        assert len(built) == count


def copy_for_another_patient(place: Workplace) -> None:
    for number, who in enumerate(("A-1111", "B-2222")):
        write_dicom_series(place.sources / who, phantom_hu(), base_affine(), SeriesIdentity(patient=who), seed=number)


def test_the_same_pixels_under_two_patients_are_reported(place):
    copy_for_another_patient(place)
    summary = place.ingest()
    assert len(summary.committed) == 2
    assert [sorted(v.volume_id for v in summary.committed)] == [sorted(ids) for ids in summary.duplicates]
    assert "same pixels" in summary.conclusion(place.out)
    assert len(summary.document()["duplicates"]) == 1


def test_one_of_two_with_the_same_pixels_is_kept_on_request(place):
    copy_for_another_patient(place)
    summary = place.ingest(duplicates="keep-first")
    assert len(summary.committed) == 1
    assert sorted((v.status, v.code) for v in summary.files)[0] == ("skipped", "duplicate_pixels")
    again = place.ingest(duplicates="keep-first")
    assert (len(again.fresh), again.committed, again.counts) == (1, [], summary.counts)


@pytest.mark.parametrize("numbering", slow_but([(0, 1, 2), (1, 2, 3)], [(1, 2, 3)]))
def test_partitions_together_make_the_whole(first, tmp_path, numbering):
    place = first.copy(tmp_path)
    made = []
    for number in numbering:
        summary = place.ingest(partition=(number, 3))
        assert sum(summary.counts.values()) == 2 * SLICES + 2
        made += [v.volume_id for v in summary.committed]
    assert len(made) == len(set(made)) == 3
    assert contents(place.store) == contents(first.store)
    assert place.ingest().committed == []


@pytest.mark.parametrize("text", ["", "1", "1/2/3", "a/b", "1/0", "-1/2", "3/2"])
def test_wrong_partitions_are_usage_errors(text):
    with pytest.raises(UsageError, match="--partition"):
        IngestOptions(partition=parse_partition(text))


@pytest.mark.parametrize(
    "address", ["tcp://10.1.2.3:8786", "10.1.2.3:8786", "tcp://node7:8786", "tcp://[2001:db8::1]:1"]
)
def test_a_scheduler_that_anybody_may_reach_is_refused(address):
    with pytest.raises(SecurityError, match="--trust-network"):
        IngestOptions(scheduler=address)
    IngestOptions(scheduler=address, trust_network=True)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "localhost:1", "tcp://[::1]:8786", "tls://node7:8786"])
def test_a_scheduler_on_this_machine_or_by_tls_is_fine(address):
    IngestOptions(scheduler=address)


@pytest.mark.slow
def test_a_running_scheduler_makes_the_same_store(first, tmp_path):
    from distributed import LocalCluster

    place = first.copy(tmp_path)
    with LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        assert len(place.ingest(scheduler=cluster.scheduler_address).committed) == 3
        assert cluster.scheduler.status.name == "running"  # it is not ours to close
    assert contents(place.store) == contents(first.store)


def test_volumes_of_an_earlier_recipe_are_reported_and_not_read(first, tmp_path):
    place = first.copy_all(tmp_path)
    other = replace(NATIVE, superpatch=16)
    summary = place.ingest(next(place.sources.rglob("*.nii.gz")), recipe=other, update=True)
    assert len(summary.committed) == 1 and len(summary.outdated) == 2
    assert "earlier recipe" in summary.conclusion(place.out)
    assert [v.tile for v in place.store.volumes()] == [16]
    assert len(SuperpatchReader(place.store).volumes) == 1
    assert place.ingest(recipe=other).outdated == []
    assert len(place.store.volumes()) == 3


def edit_after_hashing(path: Path):
    def progress(stage: str, done: int, total: int | None) -> None:
        if stage == "hash" and done == total:
            edit_pixel(path)

    return progress


def test_a_file_that_changes_between_hash_and_build_is_read_again(first, tmp_path):
    place = first.copy(tmp_path)
    place.ingest()
    path = slices_of(place.sources, PATIENTS[0])[7]
    place.ingest(force=True, rehash=True, progress=edit_after_hashing(path))
    assert len(place.ingest().committed) == 1


def test_a_new_source_is_hashed_as_it_was_read(first, tmp_path):
    """Read once: hash and voxels are of the same bytes, so nothing is left to be made again."""
    place = first.copy(tmp_path)
    path = slices_of(place.sources, PATIENTS[0])[7]
    before = {volume.source_hash for volume in first.store.volumes()}
    place.ingest(progress=edit_after_hashing(path))
    assert len({volume.source_hash for volume in place.store.volumes()} - before) == 1
    assert place.ingest().committed == []


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_the_next_run_goes_on(first, tmp_path):
    place = first.copy(tmp_path)
    process = place.start_until("volumes/??/*/*", workers=0, stderr=subprocess.PIPE, text=True)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "goes on" in stderr.splitlines()[-1]
    done = place.store.volumes()
    assert 1 <= len(done) < 3
    place.ingest()
    assert contents(place.store) == contents(first.store)
    assert {v.volume_id: v.attempt for v in done}.items() <= {
        v.volume_id: v.attempt for v in place.store.volumes()
    }.items()


# --- identities


def test_the_id_map_is_the_owners_and_outside_the_store(first, tmp_path):
    place = first.copy_all(tmp_path)
    path = tmp_path / "map.json"
    place.ingest(id_map=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    entries = {entry["volume_id"]: entry for entry in json.loads(path.read_text())}
    assert set(entries) == {v.volume_id for v in place.store.volumes()}
    assert {entry["patient"] for entry in entries.values()} == {*PATIENTS, None}
    with pytest.raises(UsageError, match="outside the store"):
        place.ingest(id_map=place.out / "map.json")


def test_the_search_for_patients_finds_what_was_planted_and_nothing_else(first, tmp_path):
    place = first.copy_all(tmp_path)
    words = patient_words(path for path in place.sources.rglob("*") if path.is_file())
    assert {"doe-jane-4711", "roe-richard-0815"} <= words
    assert findings(place.store, words) == []
    (place.out / "recipes" / "note.json").write_text('{"who": ["DOE-JANE-4711"]}')
    (place.out / "DOE-JANE-4711.json").write_text("{}")
    before = sorted(place.out.rglob("*"))
    assert findings(place.store, words) == ["DOE-JANE-4711.json", "recipes/note.json"]
    assert sorted(place.out.rglob("*")) == before


def test_volumes_with_a_head_are_flagged(place):
    who = SeriesIdentity(extra={"BodyPartExamined": "HEAD"})
    write_dicom_series(place.sources, phantom_hu(), base_affine(), who)
    (volume,) = place.ingest().committed
    assert "head" in volume.notes
