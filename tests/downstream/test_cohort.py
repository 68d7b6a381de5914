"""Who is learnt from and who is scored; a scan that was trained on is found under any name."""

from __future__ import annotations

import shutil

import pytest
from support.labelled import SPACING, affine_of, phantom
from support.proofs import SPLIT, make_world
from support.runs import save_run
from support.stores import add_volume

from maesil.data.known_scans import record_scans
from maesil.data.split import Split, write_split
from maesil.downstream.cohort import choose_cohort
from maesil.errors import UsageError
from maesil.store.index import write_index
from maesil.store.nifti import write_nifti
from maesil.training.checkpoint import load_run

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (28, 34, 44)
"""No larger than it takes for thumbnails to be compared as those of real scans are."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("cohort"), SHAPE)


def choose(store, labels, run, part="validation", split=None, seed=0, **given):
    given = {"include_trained": False, **given}
    return choose_cohort(store, labels, {run: load_run(run)}, part, split, seed, **given)


def test_the_split_says_who_is_who_and_test_patients_are_left_alone(world):
    store, labels, volumes, run, split = world
    cohort = choose(store, labels, run, split=split)
    assert (set(cohort.learnt), set(cohort.scored)) == (set(SPLIT.train), set(SPLIT.validation))
    assert {v.volume_id for v in cohort.volumes()} == {v.volume_id for v in volumes[:5]}
    assert set(choose(store, labels, run, "test", split).scored) == {"patient-5"}
    assert cohort.patient_of()[volumes[3].volume_id] == "patient-3"


def test_without_a_split_only_unseen_patients_are_scored_and_the_parts_are_apart(world):
    store, labels, _, run, _ = world
    for seed in range(2):
        parts = [choose(store, labels, run, part, seed=seed) for part in ("validation", "test")]
        scored = [set(one.scored) for one in parts]
        assert all(scored) and not scored[0] & scored[1] and not set.union(*scored) & set(SPLIT.train)
        assert set(parts[0].learnt) == set(parts[1].learnt) >= set(SPLIT.train)
        assert not set(parts[0].learnt) & set.union(*scored)


def test_a_scored_patient_that_was_trained_on_is_refused_unless_told(world, tmp_path):
    store, labels, volumes, run, _ = world
    other = Split(("patient-1",), ("patient-0", "patient-3"))
    write_split(tmp_path / "split.json", other, [store.fingerprint])
    with pytest.raises(
        UsageError, match=rf"trained on 1 patient to be scored: volumes {volumes[0].volume_id[:12]} \(id"
    ):
        choose(store, labels, run, split=tmp_path / "split.json")
    cohort = choose(store, labels, run, split=tmp_path / "split.json", include_trained=True)
    assert "patient-0" in cohort.scored and any("optimistic" in note for note in cohort.notes)


def planted(world, folder, group: str):
    """The world with patient 3's scan once more, moved by two voxels and brighter by 3 HU, as another patient."""
    store, labels, *_ = world
    shutil.copytree(store.path, folder / "store")
    shutil.copytree(labels, folder / "labels")
    copy = type(store).open(folder / "store")
    hu, organs = phantom(3, SHAPE, affine_of())
    volume = add_volume(copy, hu[2:] + 3, name=group, group=group, spacing=SPACING)
    write_nifti(folder / "labels" / f"{volume.volume_id}.nii.gz", organs[2:], volume.affine)
    write_index(copy)
    return type(store).open(folder / "store"), folder / "labels", volume


def test_a_copy_of_a_scored_patient_among_those_learnt_from_is_found(world, tmp_path):
    run = world[3]
    store, labels, _ = planted(world, tmp_path, "a-copy")
    write_split(tmp_path / "split.json", Split((*SPLIT.train, "a-copy"), SPLIT.validation), [store.fingerprint])
    with pytest.raises(UsageError, match="hold the same scan"):
        choose(store, labels, run, split=tmp_path / "split.json")


def test_a_copy_of_a_scored_patient_that_the_run_was_trained_on_is_found(world, tmp_path):
    store, _, volume = planted(world, tmp_path, "z-copy")
    trained = Split(("patient-0", "z-copy"), ())
    run = save_run(tmp_path / "run", trained)
    record_scans(run, [store], trained)
    clean, clean_labels, volumes, _, split = world  # the copy is not even in the store that is scored
    with pytest.raises(UsageError, match=rf"{volumes[3].volume_id[:12]} \(thumbnail\)"):
        choose(clean, clean_labels, run, split=split)
    assert volume.volume_id not in {one.volume_id for one in volumes}


def test_nobody_to_learn_from_or_to_score_is_said(world, tmp_path):
    store, labels, volumes, run, split = world
    few = tmp_path / "labels"
    few.mkdir()
    shutil.copy(labels / f"{volumes[0].volume_id}.nii.gz", few)
    with pytest.raises(UsageError, match="found 1 and 0 of 1 labelled patient"):
        choose(store, few, run, split=split)
    with pytest.raises(UsageError, match="expected three labelled patients"):
        choose(store, few, run)
