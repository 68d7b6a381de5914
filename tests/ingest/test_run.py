"""Ingest as a whole: what a second, an interrupted, a simultaneous and an altered run make of the same sources."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from support.ct_phantom import base_affine
from support.sources import (
    FILES,
    NATIVE,
    PATIENTS,
    SLICES,
    Workplace,
    assert_anonymous,
    edit_pixel,
    incomplete,
    phantom_hu,
    slices_of,
    snapshot,
)

from maesil.errors import NoInputError, UsageError
from maesil.store.index import index_is_current
from maesil.store.nifti import write_nifti
from maesil.store.reader import SuperpatchReader
from maesil.store.verify import verify


def test_voxels_and_positions_are_those_of_the_sources(first):
    reader, expected = SuperpatchReader(first.store), {}
    for number in (0, 1):
        expected[phantom_hu(7.0 * number).sum()] = phantom_hu(7.0 * number)
    expected[phantom_hu(20.0).sum()] = phantom_hu(20.0)
    for volume in first.store.volumes():
        hu = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
        np.testing.assert_array_equal(hu, expected.pop(float(hu.sum(dtype=np.float64))))
        np.testing.assert_allclose(volume.affine, base_affine(), atol=1e-4)
        assert (reader.read_map(volume.volume_id, "valid") == 255).all()
    assert not expected
    assert verify(first.store).problems == ()


def test_the_second_run_writes_nothing(place):
    place.ingest()  # remembers the sources of the copy
    before, cache = snapshot(place.out), snapshot(place.root / "cache")
    summary = place.ingest()
    assert snapshot(place.out) == before
    locks = [path for path in snapshot(place.root / "cache") if path.startswith("scans")]
    assert [Path(path).suffix for path in locks] == [".lock"], "the tables of the scan are gone"
    assert {**snapshot(place.root / "cache"), **{path: cache[path] for path in locks}} == cache
    assert (len(summary.fresh), summary.committed) == (3, [])
    assert summary.conclusion(place.out).startswith("nothing to do: 3 volumes are up to date")
    assert summary.counts == {"used": 2 * SLICES + 1, "skipped": 0, "quarantined": 0, "ignored": 1}


def test_a_lost_memory_costs_no_work(place):
    before = snapshot(place.out)
    assert place.ingest(cache_folder=place.root / "new cache").committed == []
    assert place.ingest(cache_folder=Path("/dev/null/no folder")).committed == []
    assert snapshot(place.out) == before


def test_a_touch_redoes_nothing(place):
    for path in slices_of(place.sources, PATIENTS[0]):
        os.utime(path)
    assert place.ingest().committed == []


def test_an_edited_slice_redoes_its_volume_only(place):
    before = place.store.volumes()
    edit_pixel(slices_of(place.sources, PATIENTS[0])[7])
    summary = place.ingest()
    (redone,) = summary.committed
    assert redone.generation == 2
    assert len(summary.fresh) == 2
    after = {v.volume_id: v for v in place.store.volumes()}
    assert [v.volume_id for v in before if v != after[v.volume_id]] == [redone.volume_id]
    hu = SuperpatchReader(place.store).read_region(redone.volume_id, (0, 0, 0), redone.shape)
    difference = hu - phantom_hu()
    assert np.count_nonzero(difference) == 1 and difference[7].max() == 5
    assert index_is_current(place.store)


def test_an_edit_that_keeps_size_and_time_needs_rehash(place):
    place.ingest()
    path = slices_of(place.sources, PATIENTS[0])[7]
    status = path.stat()
    edit_pixel(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert place.ingest().committed == []
    assert len(place.ingest(rehash=True).committed) == 1


def test_an_edited_affine_redoes_the_nifti_as_another_volume(place):
    path = next(place.sources.rglob("*.nii.gz"))
    write_nifti(path, phantom_hu(20.0).astype(np.int16), base_affine(origin=(0, 0, 1)))
    summary = place.ingest()
    assert len(summary.committed) == 1 and summary.absent == 1
    assert "1 volume of the store came from other sources" in summary.conclusion(place.out)


def test_moved_and_renamed_sources_are_the_same_volumes(first, tmp_path):
    place = first.copy_all(tmp_path)
    rng = random.Random(0)
    for number, path in enumerate(sorted(place.sources.rglob("*"), key=lambda _: rng.random())):
        if path.is_file():
            suffix = ".nii.gz" if path.name.endswith(".nii.gz") else ""
            target = place.root / f"elsewhere/{number % 3}/file{number}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    before = snapshot(place.out)
    summary = place.ingest(place.root / "elsewhere")
    assert (len(summary.fresh), summary.committed, summary.absent) == (3, [], 0)
    assert snapshot(place.out) == before


def test_dry_run_writes_nothing_at_all(first, tmp_path, monkeypatch):
    place = Workplace(tmp_path)
    shutil.copytree(first.sources, place.sources)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    before = snapshot(tmp_path)
    summary = place.ingest(dry_run=True, key_file=None, cache_folder=None)
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sources"]
    assert len(summary.planned) == 3
    assert sum(summary.counts.values()) == FILES
    assert "nothing was written" in summary.conclusion(place.out)


def test_another_recipe_is_refused_until_update(place):
    other, before = replace(NATIVE, superpatch=16), snapshot(place.out)
    with pytest.raises(UsageError, match="superpatch_voxels: 32 -> 16"):
        place.ingest(recipe=other)
    assert snapshot(place.out) == before
    summary = place.ingest(recipe=other, update=True)
    assert [v.generation for v in summary.committed] == [2, 2, 2]
    assert {v.tile for v in place.store.volumes()} == {16}
    assert place.ingest(recipe=other).committed == []
    assert verify(place.store).problems == ()


def test_another_key_is_refused(place):
    with pytest.raises(UsageError, match="--key-file"):
        place.ingest(key_file=place.root / "other.key")


def test_duplicates_are_counted_not_stored(place):
    shutil.copytree(place.sources, place.root / "more" / "copy")
    shutil.move(place.root / "more", place.sources / "more")
    summary = place.ingest()
    assert summary.committed == [] and len(summary.fresh) == 3
    assert summary.counts == {"used": 2 * SLICES + 1, "skipped": 2 * SLICES + 1, "quarantined": 0, "ignored": 2}
    codes = {verdict.code for verdict in summary.files if verdict.status == "skipped"}
    assert codes == {"duplicate_slice", "duplicate_volume"}


def test_a_file_named_twice_is_looked_at_once(place):
    path = next(place.sources.rglob("*.nii.gz"))
    summary = place.ingest(place.sources, path, place.sources / "export")
    assert len(summary.files) == FILES


def test_every_verdict_names_a_file_and_the_document_adds_up(first):
    summary = first.ingest()
    files = sorted(str(path) for path in first.sources.rglob("*") if path.is_file())
    document = json.loads(json.dumps(summary.document()))
    assert sorted(entry["path"] for entry in document["files"]) == files
    assert document["files_found"] == sum(document["counts"].values()) == sum(document["codes"].values()) == FILES


def test_part_of_the_sources_leaves_the_rest_of_the_store_alone(place):
    path = next(place.sources.rglob("*.nii.gz"))
    summary = place.ingest(path)
    assert (len(summary.fresh), summary.absent) == (1, 2)
    assert len(place.store.volumes()) == 3


def test_no_input(tmp_path):
    place = Workplace(tmp_path)
    with pytest.raises(NoInputError, match="nothing there"):
        place.ingest(tmp_path / "missing")
    place.sources.mkdir()
    with pytest.raises(NoInputError, match="found no file; name the folder"):
        place.ingest()
    (place.sources / "notes.txt").write_text("x")
    with pytest.raises(NoInputError, match="not_medical"):
        place.ingest()
    assert not place.out.exists() and not place.key.exists()


def test_a_store_inside_the_sources_is_no_source(place):
    expected = place.ingest().counts
    shutil.move(place.out, place.sources / "store.zarr")
    assert Workplace(place.root).ingest().counts == expected


def test_nothing_about_the_patients_is_in_the_store(first, tmp_path):
    place = first.copy(tmp_path)
    incomplete(place)
    nifti = next(place.sources.rglob("*.nii.gz"))
    shutil.copy(nifti, nifti.with_name("SMITH-43.nii.gz"))
    with nifti.with_name("SMITH-43.nii.gz").open("r+b") as file:
        file.truncate(2000)
    place.ingest()
    assert len(place.store.quarantined()) == 2
    words = ["SMITH", "DOE", "ROE", "JANE", "4711", "description of", "20200101", str(place.root), "sources", ".dcm"]
    for path in place.sources.rglob("*.dcm"):
        data = pydicom.dcmread(path, stop_before_pixels=True)
        words += [
            data.SOPInstanceUID,
            data.SeriesInstanceUID,
            data.StudyInstanceUID,
            data.FrameOfReferenceUID,
            path.stem,
        ]
    assert_anonymous(place, sorted(set(words)))
    secret = place.key.read_bytes()
    assert not any(secret in path.read_bytes() for path in place.out.rglob("*") if path.is_file())


def test_another_key_gives_other_ids(first, tmp_path):
    place = first.copy(tmp_path)
    place.key.unlink()
    place.ingest()
    ours, theirs = place.store.volumes(), first.store.volumes()
    assert not {v.volume_id for v in ours} & {v.volume_id for v in theirs}
    assert not {v.group for v in ours} & {v.group for v in theirs}
    assert {v.source_hash for v in ours} == {v.source_hash for v in theirs}
