"""`maesil ingest` as people use it: what it prints, its exit code, what lies there afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from support.command_line import fails, ingest, run
from support.sources import PATIENTS, Workplace, slices_of

from maesil import errors


def test_ingest_info_verify_export_index(tmp_path, sources):
    out, key = tmp_path / "s.zarr", tmp_path / "key"
    more = ("--spacing", "native", "--superpatch", 32, "--key-file", key)
    code, stdout, _ = run(*ingest(sources, out, *more, "--dry-run"))
    assert code == 0 and "3 volumes would be made" in stdout and not out.exists() and not key.exists()
    code, stdout, _ = run(*ingest(sources, out, *more))
    assert code == 0 and "3 volumes committed" in stdout
    code, stdout, _ = run(*ingest(sources, out, *more, "--json"))
    assert code == 0
    document = json.loads(stdout)
    assert document["files_found"] == sum(document["counts"].values()) == 50
    assert len(document["fresh"]) == 3 and document["committed"] == []
    code, stdout, _ = run(*ingest(sources, out, *more))
    assert code == 0 and "nothing to do: 3 volumes are up to date" in stdout
    line = fails(errors.EXIT_USAGE, *ingest(sources, out, "--superpatch", 64, "--key-file", key))
    assert "--update" in line
    code, stdout, _ = run("store", "info", out)
    assert code == 0 and "3 volumes of 1 patient, " in stdout  # one phantom, its soft parts 7 and 20 HU apart
    info = json.loads(run("store", "info", out, "--json")[1])
    assert len(info["volumes"]) == 3
    assert run("store", "verify", out)[:2] == (0, "3 volumes, 12 superpatches: all intact\n")
    volume_id = info["volumes"][0]["volume_id"]
    code, stdout, _ = run("store", "export", out, "--out", tmp_path / "nifti", volume_id[:12])
    assert (code, stdout.strip()) == (0, str(tmp_path / "nifti" / f"{volume_id}.nii.gz"))
    assert nib.load(stdout.strip()).shape == tuple(info["volumes"][0]["shape_zyx"])[::-1]
    (out / "index" / "volumes.parquet").unlink()
    assert run("store", "index", out)[:2] == (0, "indexed 3 volumes, 12 superpatches\n")


def test_a_refusal_is_1_unless_allowed(tmp_path, sources):
    place = Workplace(tmp_path)
    shutil.copytree(sources, place.sources)
    nifti = next(place.sources.rglob("*.nii.gz"))
    nifti.write_bytes(nifti.read_bytes()[:-40])
    more = ("--spacing", "native", "--superpatch", 32, "--key-file", place.key)
    code, stdout, _ = run(*ingest(place.sources, place.out, *more))
    assert code == errors.EXIT_REFUSED and "damaged_file" in stdout
    assert run(*ingest(place.sources, place.out, *more))[0] == errors.EXIT_REFUSED
    assert run(*ingest(place.sources, place.out, *more, "--max-refused", 1))[0] == 0


def test_odd_values_in_headers_make_no_noise(tmp_path, sources, home):
    """pydicom warns and logs what it finds odd, quoting it: neither may reach the screen, where logs keep it."""
    import pydicom

    place = Workplace(tmp_path)
    for path in slices_of(sources, PATIENTS[0]):
        data = pydicom.dcmread(path)
        data["StudyInstanceUID"]._value = data.StudyInstanceUID + ".0DOE01"
        place.sources.mkdir(exist_ok=True)
        data.save_as(place.sources / path.name)
    command = [sys.executable, "-m", "maesil", "ingest", str(place.sources), "--out", str(place.out), "--workers", "0"]
    command += ["--spacing", "native", "--superpatch", "32", "--key-file", str(place.key)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home})
    assert done.returncode == 0, done.stderr
    assert "DOE" not in done.stderr + done.stdout and "Warning" not in done.stderr
    assert np.all([re.match(r"(scan|hash|build|report): ", line) for line in done.stderr.splitlines()]), done.stderr


def test_a_store_given_as_a_source_is_named_as_one(tmp_path, store, sources):
    for place in (store, store / "volumes"):
        line = fails(errors.EXIT_USAGE, *ingest(place, tmp_path / "out.zarr"))
        assert "found a store that `maesil ingest` made" in line and f"maesil store info {store}" in line
    shutil.copytree(store, tmp_path / "below" / "s.zarr")
    line = fails(errors.EXIT_NO_INPUT, *ingest(tmp_path / "below", tmp_path / "out.zarr"))
    assert "Zarr folders only, which are not looked into" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below"]


@pytest.fixture
def nothing_read(tmp_path) -> Path:
    """A zip member by a method that is not read, a link, a MetaImage and an NRRD; no CT beside them."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mhd").write_text("ObjectType = Image\nNDims = 3\n")
    (folder / "b.nrrd").write_text("NRRD0004\ntype: short\n")
    (folder / "scan.dcm").symlink_to("/etc/hostname")
    with zipfile.ZipFile(folder / "c.zip", "w") as archive:
        archive.writestr("scan.dcm", b"x" * 200)
    data = (folder / "c.zip").read_bytes()  # a method that zipfile does not write
    data = data.replace(b"PK\3\4" + data[4:8] + b"\0\0", b"PK\3\4" + data[4:8] + b"\t\0", 1)
    at = data.index(b"PK\1\2") + 10
    (folder / "c.zip").write_bytes(data[:at] + b"\t\0" + data[at + 2 :])
    return folder


WAYS_OUT = {
    "metaimage": "convert it to NIfTI", "nrrd": "convert it to NIfTI", "symlink": "--follow-links follows it",
    "zip_method": "unpack the archive and name the folder",
}  # fmt: skip


@pytest.mark.parametrize("where", ["new", "store", "cache", "dry"])
def test_a_run_that_found_nothing_tells_as_any_other(tmp_path, nothing_read, store, where):
    """Table, JSON and report name each reason and its way out; a store that is there already keeps its own."""
    out = tmp_path / "s.zarr"
    if where == "store":
        shutil.copytree(store, out)
    more = {"cache": (), "dry": ("--out", out, "--dry-run")}.get(where, ("--out", out))
    report = ("--report", tmp_path / "r") if where in ("cache", "store") else ()
    code, table, told = run("ingest", nothing_read, *more, *report, "--workers", 0)
    assert code == errors.EXIT_NO_INPUT and told.splitlines()[-1].startswith("error: ")
    code, document, _ = run("ingest", nothing_read, *more, *report, "--workers", 0, "--json")
    files = {file["code"]: file for file in json.loads(document)["files"]}
    assert code == errors.EXIT_NO_INPUT and set(files) == {*WAYS_OUT, "archive"}
    for reason, way_out in WAYS_OUT.items():
        assert reason in table and way_out in files[reason]["detail"]
    assert "no volume was made" in table or where == "dry"
    folder = {"new": tmp_path / "s.report", "dry": tmp_path / "s.report"}.get(where, tmp_path / "r")
    assert (folder / "index.html").exists() == (where != "dry")
    if where != "dry":
        page = (folder / "index.html").read_text()
        assert all(reason in page for reason in WAYS_OUT)
        rows = {row["code"]: row["path"] for row in pq.read_table(folder / "files.parquet").to_pylist()}
        assert set(rows) == {*WAYS_OUT, "archive"}
    assert out.exists() == (where == "store")


def test_a_report_of_nothing_becomes_that_of_the_store(tmp_path, nothing_read, sources):
    """The next run, with scans, writes into the same folder."""
    run(*ingest(nothing_read, tmp_path / "s.zarr"))
    assert run(*ingest(sources, tmp_path / "s.zarr"))[0] == 0
    codes = {row["code"] for row in pq.read_table(tmp_path / "s.report" / "files.parquet").to_pylist()}
    assert {"metaimage", "committed"} <= codes
