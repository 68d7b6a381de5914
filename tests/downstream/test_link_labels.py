"""Labels are linked under the ids that the report of an ingest knows."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maesil.downstream.link_labels import link_labels
from maesil.errors import NoInputError, UsageError


@pytest.fixture
def report(tmp_path):
    """The report of two NIfTI files, of a DICOM series of two slices, and of a file that was no CT."""
    rows = [
        (tmp_path / "img/img0001.nii.gz", "used", "aa"), (tmp_path / "img/img0002.nii.gz", "used", "bb"),
        (tmp_path / "ct/7/1-1.dcm", "used", "cc"), (tmp_path / "ct/7/1-2.dcm", "used", "cc"),
        (tmp_path / "img/img0003.nii.gz", "quarantined", "dd"),
    ]  # fmt: skip
    table = {"path": [str(row[0]) for row in rows], "status": [r[1] for r in rows], "volume_id": [r[2] for r in rows]}
    (tmp_path / "report").mkdir()
    pq.write_table(pa.table(table), tmp_path / "report" / "files.parquet")
    (tmp_path / "label").mkdir()
    for name in ("label0001.nii.gz", "label0003.nii.gz", "7.nii"):
        (tmp_path / "label" / name).write_text(name)
    return tmp_path / "report"


def links(folder):
    return {path.name: path.resolve().name for path in folder.iterdir()}


def test_files_lead_to_labels_and_what_has_none_is_told(report, tmp_path):
    linked = link_labels(report, tmp_path / "out", r"img/img(\d+)", r"label/label\1")
    assert links(tmp_path / "out") == {"aa.nii.gz": "label0001.nii.gz"}
    assert (linked.volumes, linked.without) == (1, ("bb",))
    assert link_labels(report / "files.parquet", tmp_path / "out", r"img/img(\d+)", r"label/label\1") == linked  # again


def test_a_label_of_several_volumes_is_told(report, tmp_path):
    linked = link_labels(report, tmp_path / "out", r"img/img\d+", "label/label0001")
    assert linked.volumes == 2 and linked.shared == ((str(tmp_path / "label/label0001.nii.gz"), 2),)
    assert link_labels(report, tmp_path / "other", r"img/img(\d+)", r"label/label\1").shared == ()


def test_a_damaged_report_is_told_in_one_line(report, tmp_path):
    (report / "files.parquet").write_bytes(b"PAR1")
    with pytest.raises(NoInputError, match="found it damaged"):
        link_labels(report, tmp_path / "out", "a", "b")


def test_all_slices_of_a_series_lead_to_one_label_or_it_is_refused(report, tmp_path):
    link_labels(report, tmp_path / "out", r"ct/(\d+)/.*", r"label/\1.nii")
    assert links(tmp_path / "out") == {"cc.nii": "7.nii"}
    with pytest.raises(UsageError, match="volume cc: expected one label"):
        link_labels(report, tmp_path / "out", r"ct/(\d+)", r"label/\1")


def test_a_folder_of_masks_is_linked_whole(report, tmp_path):
    (tmp_path / "segmentations" / "0001").mkdir(parents=True)
    link_labels(report, tmp_path / "out", r"img/img(\d+)\.nii\.gz$", r"segmentations/\1")
    assert links(tmp_path / "out") == {"aa": "0001"} and (tmp_path / "out" / "aa").is_dir()


def test_what_leads_nowhere_is_told_with_an_example(report, tmp_path):
    with pytest.raises(UsageError, match="in the path of none of 4 used files, for example"):
        link_labels(report, tmp_path / "out", "scan", "label")
    with pytest.raises(NoInputError, match="look at --image and --label"):
        link_labels(report, tmp_path / "out", r"img/img", r"img/mask")
    with pytest.raises(UsageError, match="regular expression"):
        link_labels(report, tmp_path / "out", r"img/(", "x")
    with pytest.raises(UsageError, match="regular expression"):
        link_labels(report, tmp_path / "out", r"img", r"\1")
    with pytest.raises(NoInputError, match=r"files.parquet of an ingest"):
        link_labels(tmp_path / "label", tmp_path / "out", "a", "b")


def test_what_is_there_already_is_never_replaced(report, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "aa.nii.gz").write_text("drawn by hand")
    with pytest.raises(UsageError, match="is there already"):
        link_labels(report, tmp_path / "out", r"img/img(\d+)", r"label/label\1")
    assert (tmp_path / "out" / "aa.nii.gz").read_text() == "drawn by hand"
