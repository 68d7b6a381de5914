"""Series that a manifest or a collection of the Imaging Data Commons names: which are taken, and what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.command_line import SMALL, fails, ingest, run
from support.ct_phantom import base_affine
from support.objects import gets_of, upload
from support.sources import phantom_hu

from maesil.ingest.named import TABLE_VARIABLE
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series


@pytest.fixture
def series(tmp_path, bucket):
    """Three series of three patients, each below a prefix of its own, as the Imaging Data Commons has them."""
    for number in range(3):
        who = SeriesIdentity(patient=f"P{number}", study=f"S{number}")
        write_dicom_series(tmp_path / "series" / f"uuid-{number}", phantom_hu(5.0 * number), base_affine(), who)
    upload(tmp_path / "series", bucket, "idc")
    return [f"s3://{bucket}/idc/uuid-{number}/*" for number in range(3)]


def write_table(path, rows):
    header = "SeriesInstanceUID,PatientID,collection_id,Modality,series_aws_url"
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")


def manifest(*more):
    return (
        "ingest",
        "--manifest",
        "series.csv",
        "--out",
        "store.zarr",
        "--workers",
        0,
        "--key-file",
        "key",
        *SMALL,
        *more,
    )


def test_a_manifest_names_series_and_a_bad_row_costs_one_line(series, bucket, here):
    bad = ["http://host/x", "", f"s3://{bucket}/idc/gone/*", "no/such/folder", "s3://bucket/a?sig=1"]
    good = [*series[:2], "series/uuid-2"]
    rows = [("1.2", "P", "c", "CT", place) for place in (*bad, *good, good[0])]
    write_table(here / "series.csv", [*rows, ("1.3", "P", "c", "MR", series[0]), ("1.3", "P", "c", "MR", series[0])])
    code, out, stderr = run(*manifest("--json"))
    assert code == 1, stderr
    assert len(json.loads(out)["committed"]) == 3, "two of the bucket, one of this machine"
    lines = [line for line in stderr.splitlines() if line.endswith("; left out")]
    assert [line.split(":")[0] for line in lines] == [f"series.csv, line {n}" for n in (2, 3, 5, 6, 4)]
    assert "series.csv: 2 rows of other modalities than CT left out" in stderr and "sig" not in stderr
    assert run(*manifest("--max-refused", 5))[0] == 0


def test_only_the_first_series_are_taken_and_a_dry_run_reads_headers(series, bucket, proxy, here):
    write_table(here / "series.csv", [("1.2", "P", "c", "CT", place) for place in series])
    code, out, stderr = run(*manifest("--limit-series", 2, "--dry-run"))
    assert code == 0 and "dry run: 2 volumes (" in out and "in 2 places" in stderr, out + stderr
    assert not gets_of(proxy, "idc/uuid-2") and len(gets_of(proxy, "idc/uuid-1")) == len(phantom_hu())


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("a,b\n1,2\n", 2, "expected a column series_url or series_aws_url or path"),
        ("", 2, "found nothing"),
        ("path\nno/such\n", 3, "found none that can be read"),
        (None, 3, "expected a CSV file, found none"),
        (b"path\n\xff\xfe\n", 2, "no text in UTF-8"),
    ],
)
def test_a_manifest_without_series_is_told(here, text, code, told):
    if text is not None:
        (here / "series.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    found, _, stderr = run(*manifest())
    assert found == code and told in stderr.splitlines()[-1]


def test_sources_must_be_named(here):
    assert "expected SRC or --manifest" in fails(2, "ingest", "--out", "store.zarr")
    assert "name one of them" in fails(2, "ingest", ".", "--out", "store.zarr", "--limit-series", 2)


@pytest.fixture
def commons(series, here, monkeypatch):
    """A table of the Imaging Data Commons that leads to those series and to others."""
    names = ("collection_id", "PatientID", "SeriesInstanceUID", "Modality", "series_aws_url", "series_size_MB")
    rows = [("nlst", "P2", "1.2.2", "CT", series[2], 1.0), ("nlst", "P1", "1.2.1", "CT", series[1], 1.0),
            ("nlst", "P0", "1.2.9", "SEG", series[0], 1.0), ("lidc_idri", "P0", "1.2.0", "CT", series[0], 1.0),
            ("breast_mr", "P9", "1.2.9", "MR", series[0], 1.0)]  # fmt: skip
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), here / "idc.parquet")
    monkeypatch.setenv(TABLE_VARIABLE, str(here / "idc.parquet"))


def test_a_collection_of_the_imaging_data_commons_is_ingested(commons, bucket, proxy, here):
    code, out, stderr = run(*ingest("idc://nlst", "store.zarr", "--key-file", "key", *SMALL, "--limit-series", 1))
    assert code == 0 and "1 volume committed" in out, out + stderr
    assert gets_of(proxy, "idc/uuid-1") and not gets_of(proxy, "idc/uuid-2"), "in the order of patients"
    code, out, stderr = run(*ingest("idc://NLST", "store.zarr", "--key-file", "key", *SMALL))
    assert code == 0 and "1 volume committed" in out and "1 was up to date" in out, out + stderr
    assert gets_of(proxy, "idc/uuid-2") and not gets_of(proxy, "idc/uuid-0"), "neither another modality nor collection"


def test_what_is_no_collection_of_ct_is_told(commons, here, monkeypatch):
    assert "did you mean idc://lidc_idri?" in fails(2, *ingest("idc://lidc-idr", "store.zarr"))
    assert "found those of others only" in fails(3, *ingest("idc://breast_mr", "store.zarr"))
    Path("idc.parquet").write_bytes(b"no table")
    assert "expected a Parquet table" in fails(2, *ingest("idc://nlst", "store.zarr"))
    monkeypatch.delenv(TABLE_VARIABLE)
    monkeypatch.setattr("maesil.ingest.named.not_installed", lambda modules: modules[0])
    assert "pip install 'maesil[idc]'" in fails(2, *ingest("idc://nlst", "store.zarr"))
