"""Ingest as a whole: what a second, an interrupted, a simultaneous and an altered run make of the same sources."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from support.ct_phantom import base_affine
from support.sources import (
    NATIVE,
    PATIENTS,
    SLICES,
    Workplace,
    attempts,
    contents,
    edit_pixel,
    phantom_hu,
    slices_of,
    snapshot,
    write_sources,
)

from maesil.cache.reader import SuperpatchReader
from maesil.errors import NoInputError, UsageError
from maesil.index import index_is_current
from maesil.nifti_export import write_nifti
from maesil.verify import verify

FILES = 2 * SLICES + 2


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Workplace:
    """The sources, ingested once, undisturbed. Tests only read it."""
    place = Workplace(tmp_path_factory.mktemp("first"))
    write_sources(place.sources)
    summary = place.ingest()
    assert len(summary.committed) == 3
    return place


@pytest.fixture
def place(first, tmp_path) -> Workplace:
    """A copy of sources and store of one's own."""
    return first.copy_all(tmp_path)


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
    assert snapshot(place.root / "cache") == cache
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
    assert "1 volumes of the store have no source" in summary.conclusion(place.out)


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
    with pytest.raises(NoInputError, match="no file at all"):
        place.ingest()
    (place.sources / "notes.txt").write_text("x")
    with pytest.raises(NoInputError, match="not_medical"):
        place.ingest()
    assert not place.out.exists() and not place.key.exists()


def test_a_store_inside_the_sources_is_no_source(place):
    expected = place.ingest().counts
    shutil.move(place.out, place.sources / "store.zarr")
    assert Workplace(place.root).ingest().counts == expected


# --- refusals


def incomplete(place: Workplace) -> Path:
    """Take a slice out of the middle of the first patient; return it for putting back."""
    path = slices_of(place.sources, PATIENTS[0])[9]
    hidden = place.root / "hidden.dcm"
    path.rename(hidden)
    hidden.with_suffix(".where").write_text(str(path))
    return hidden


def put_back(hidden: Path) -> None:
    hidden.rename(hidden.with_suffix(".where").read_text())


def test_a_refusal_is_recorded_once_and_released(first, tmp_path):
    place = first.copy(tmp_path)
    hidden = incomplete(place)
    summary = place.ingest()
    assert (summary.refused_volumes, len(summary.committed)) == (1, 2)
    (record,) = place.store.quarantined()
    assert record["code"] == "gap" and record["numbers"]["missing"] == [1]
    before = snapshot(place.out)
    again = place.ingest()
    assert again.refused_volumes == 1 and again.counts == summary.counts
    assert snapshot(place.out) == before
    put_back(hidden)
    assert len(place.ingest().committed) == 1
    assert place.store.quarantined() == []


def test_a_volume_that_is_whole_again_is_no_longer_recorded_as_refused(place):
    hidden = incomplete(place)
    assert place.ingest().refused_volumes == 1
    assert len(place.store.quarantined()) == 1
    put_back(hidden)
    assert len(place.ingest().fresh) == 3
    assert place.store.quarantined() == []


def test_a_nifti_file_that_is_whole_again_is_no_longer_recorded_as_refused(place):
    path = next(place.sources.rglob("*.nii.gz"))
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert place.ingest().refused_volumes == 1
    before = snapshot(place.out)
    assert place.ingest().refused_volumes == 1
    assert snapshot(place.out) == before
    path.write_bytes(data)
    assert place.ingest().refused_volumes == 0
    assert place.store.quarantined() == []


def test_a_dry_run_of_refused_sources_says_so(first, tmp_path):
    place = first.copy(tmp_path)
    next(place.sources.rglob("*.nii.gz")).unlink()
    for patient in PATIENTS:
        slices_of(place.sources, patient)[5].unlink()
    summary = place.ingest(dry_run=True)
    assert summary.refused_volumes == 2
    assert summary.conclusion(place.out).startswith("dry run: 0 volumes would be made")


def test_a_source_that_vanishes_costs_its_volume_and_leaks_no_path(first, tmp_path):
    place = first.copy(tmp_path)
    path = slices_of(place.sources, PATIENTS[0])[3]
    nifti = next(place.sources.rglob("*.nii.gz"))

    (place.sources / "zz").mkdir()
    (place.sources / "zz" / "last.txt").write_text("looked at last")

    def progress(stage: str, done: int, total: int | None) -> None:
        if stage == "scan" and done == FILES + 1:  # every header was read, no pixel yet
            path.unlink()
            nifti.unlink()

    summary = place.ingest(progress=progress)
    assert len(summary.committed) == 1
    assert summary.counts == {"used": SLICES, "skipped": 0, "quarantined": SLICES + 1, "ignored": 2}
    assert len(place.store.quarantined()) == 2
    assert_anonymous(place, ["SMITH", "DOE", path.name, str(place.root)])


@pytest.mark.parametrize(
    "failure", [MemoryError(), OSError(5, "Input/output error"), type("KilledWorker", (Exception,), {})()]
)
def test_what_may_pass_is_tried_again(first, tmp_path, monkeypatch, failure):
    """Memory, a disk's hiccup, a dead worker: the source is not to blame, and the next run must not believe it is."""
    import maesil.ingest.run

    def failing(*_):
        raise failure

    place = first.copy(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(maesil.ingest.run, "build", failing)
        assert place.ingest().refused_volumes == 3
    assert len(place.ingest().committed) == 3
    assert place.store.quarantined() == []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_json_does_not_know_end_no_run(first, tmp_path, value):
    place = first.copy(tmp_path)
    for path in slices_of(place.sources, PATIENTS[0]):
        data = path.read_bytes()
        slice_thickness = b"\x18\x00\x50\x00DS\x04\x00"
        at = data.index(slice_thickness) + len(slice_thickness)
        path.write_bytes(data[:at] + value.rjust(4).encode() + data[at + 4 :])
    assert len(place.ingest().committed) == 3


# --- privacy


def assert_anonymous(place: Workplace, words: list[str]) -> None:
    """No word stands in any byte of the store, nor in what its compressed tables decode to."""
    import pyarrow.parquet as pq

    for path in place.out.rglob("*"):
        assert not [word for word in words if word in str(path.relative_to(place.out))]
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".parquet":
                data += str(pq.read_table(path).to_pylist()).encode()
            found = [word for word in words if word.encode() in data or word.encode("utf-16-le") in data]
            assert not found, (path, found)


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


# --- interruptions and company


def forked():
    """Processes that start at once: everything heavy is imported before they fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maesil.storage", "maesil.ingest.run"])
    return context


def ingest_there(root: Path, go=None) -> None:
    if go is not None:
        go.wait()
    Workplace(root).ingest()


def test_killed_at_any_moment_it_ends_the_same(first, tmp_path):
    """SIGKILL again and again, each time a little later; then undisturbed: as if nothing had happened."""
    place, context, rng = first.copy(tmp_path), forked(), random.Random(4)
    warm_up = context.Process(target=ingest_there, args=(first.copy(tmp_path / "warm").root,))
    warm_up.start()
    warm_up.join()
    started = time.perf_counter()
    undisturbed = context.Process(target=ingest_there, args=(first.copy(tmp_path / "undisturbed").root,))
    undisturbed.start()
    undisturbed.join()
    seconds = time.perf_counter() - started
    killed = 0
    for share in np.linspace(0.3, 1.0, 5):
        process = context.Process(target=ingest_there, args=(place.root,))
        process.start()
        process.join(max(0.0, share + rng.uniform(-0.1, 0.0)) * seconds)
        killed += process.is_alive()
        process.kill()
        process.join()
        if (place.out / "zarr.json").exists():
            assert verify(place.store).problems == ()  # what is committed is always whole
    assert killed >= 2
    committed = {v.volume_id: v.attempt for v in place.store.volumes()} if (place.out / "zarr.json").exists() else {}
    place.ingest()
    assert contents(place.store) == contents(first.store)
    assert {v.generation for v in place.store.volumes()} == {1}
    assert committed.items() <= {v.volume_id: v.attempt for v in place.store.volumes()}.items()
    assert index_is_current(place.store)
    assert place.ingest().committed == []


@pytest.mark.slow
def test_the_command_killed_with_its_workers_ends_the_same(first, tmp_path):
    """SIGKILL to the whole process group of `maesil ingest` with two workers, while the first attempt is written."""
    place = first.copy(tmp_path)
    command = [sys.executable, "-m", "maesil", "ingest", str(place.sources), "--out", str(place.out), "--workers", "2"]
    command += ["--spacing", "native", "--superpatch", "32", "--key-file", str(place.key)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(place.root / "cache")}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        process.poll() is None and time.monotonic() < deadline and not list(place.out.glob("volumes/??/*/*/zarr.json"))
    ):
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    place.ingest()
    assert contents(place.store) == contents(first.store)
    assert verify(place.store).problems == ()


def test_two_at_once_commit_each_volume_once(first, tmp_path):
    place, context = first.copy(tmp_path), forked()
    place.key.unlink()  # made by whoever comes first
    go = context.Event()
    processes = [context.Process(target=ingest_there, args=(place.root, go)) for _ in range(3)]
    for process in processes:
        process.start()
    time.sleep(0.3)
    go.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    commits = list(place.store.storage.list("commits"))
    assert len(commits) == 3 and all(key.endswith("00000001.json") for key in commits)
    assert attempts(place.store) == sorted(f"{v.volume_id}/{v.attempt}" for v in place.store.volumes())
    assert verify(place.store).problems == ()
    assert index_is_current(place.store)


def test_dask_makes_the_same_store(first, tmp_path):
    """Two worker processes; besides, a refusal that has to come back from one."""
    place = first.copy(tmp_path)
    bad = place.sources / "bad.nii.gz"
    shutil.copy(next(place.sources.rglob("SMITH-42.nii.gz")), bad)
    bad.write_bytes(bad.read_bytes()[:-50])
    summary = place.ingest(workers=2)
    assert contents(place.store) == contents(first.store)
    assert summary.refused_volumes == 1
    assert [f.code for f in summary.files if f.path == bad] == ["damaged_file"]
    assert place.ingest().committed == []


def test_a_damaged_volume_is_made_again_as_its_message_says(place, first):
    volume = place.store.volumes()[0]
    shard = place.out / volume.superpatches[0].path
    shard.write_bytes(bytes(shard.stat().st_size))
    assert "delete the volume's folder below commits/" in str(verify(place.store).problems)
    shutil.rmtree((place.out / volume.key).parent)
    summary = place.ingest()
    assert [v.volume_id for v in summary.committed] == [volume.volume_id]
    assert contents(place.store) == contents(first.store)
    assert verify(place.store).problems == ()
    assert index_is_current(place.store)
