"""What a run refuses, remembers of it, and tries again."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.lanes import slow_but
from support.sources import (
    FILES,
    PATIENTS,
    SLICES,
    assert_anonymous,
    incomplete,
    slices_of,
    snapshot,
)


def put_back(hidden: Path) -> None:
    hidden.rename(hidden.with_suffix(".where").read_text())


def test_a_refusal_is_recorded_once_and_released(first, tmp_path):
    place = first.copy(tmp_path)
    hidden = incomplete(place)
    summary = place.ingest()
    assert (summary.refused_volumes, len(summary.committed)) == (1, 2)
    (record,) = place.store.quarantined()
    assert record.code == "gap" and record.numbers["missing"] == [1]
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


FAILURES = [MemoryError(), OSError(5, "Input/output error"), type("KilledWorker", (Exception,), {})()]


@pytest.mark.parametrize("failure", slow_but(FAILURES, FAILURES[2:]))
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


@pytest.mark.parametrize("value", slow_but(("nan", "inf", "-inf"), ("nan",)))
def test_numbers_that_json_does_not_know_end_no_run(first, tmp_path, value):
    place = first.copy(tmp_path)
    for path in slices_of(place.sources, PATIENTS[0]):
        data = path.read_bytes()
        slice_thickness = b"\x18\x00\x50\x00DS\x04\x00"
        at = data.index(slice_thickness) + len(slice_thickness)
        path.write_bytes(data[:at] + value.rjust(4).encode() + data[at + 4 :])
    assert len(place.ingest().committed) == 3
