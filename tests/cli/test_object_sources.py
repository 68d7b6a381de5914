"""Ingest from object storage: what is made of objects is what is made of the same files on a disk, by few requests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter

import numpy as np
import obstore
import pytest
from support.command_line import SMALL, fails, ingest, run
from support.ct_phantom import base_affine
from support.lanes import slow_but
from support.object_server import KEY_ID, SECRET, TRANSIENT
from support.objects import bucket_store, bytes_asked, gets_of, upload
from support.sources import PATIENTS, contents, edit_pixel, phantom_hu, slices_of

from maesil.errors import NoInputError, UsageError
from maesil.ingest.objects import AHEAD
from maesil.ingest.options import IngestOptions
from maesil.ingest.read import read_ct
from maesil.store.nifti import write_nifti
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.verify import verify
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series


def left_behind(here):
    """What was fetched and lies in the folder of temporary files."""
    return [path for path in (here / "tmp").glob("maesil-fetched-*/*/*") if path.name != ".lock"]


def shards(store):
    """The bytes of every superpatch file, by volume."""
    paths = {v.volume_id: sorted({p.path for p in v.superpatches}) for v in store.volumes()}
    return {name: [store.storage.read(path) for path in found] for name, found in paths.items()}


def same_store(store, local):
    assert contents(store) == contents(local) and shards(store) == shards(local)
    assert verify(store).problems == ()


def url_of(bucket):
    return f"s3://{bucket}/dicom"


def test_a_store_made_of_objects_is_the_one_made_of_the_same_files(sources, undisturbed, bucket, proxy, here):
    local, key = undisturbed
    keys = upload(sources, bucket, "dicom")
    words = ingest(url_of(bucket), here / "store.zarr", "--key-file", key, "--phi-scan", *SMALL)
    code, out, stderr = run(*words)
    assert code == 0 and f"found {len(keys)} objects of" in stderr, out + stderr
    store = Store.open(here / "store.zarr")
    same_store(store, local)
    assert left_behind(here) == []
    assert proxy.most_in_flight >= 4, "several GETs are on their way at once"
    report = json.loads((here / "store.report" / "summary.json").read_text())
    assert report["sources"] == [url_of(bucket)] and report["phi_scan"]["headers"] >= 48
    told = run("store", "explain", "store.zarr", store.volumes()[0].volume_id)
    assert told[0] == 0 and f"{url_of(bucket)}/" in told[1], "its files are named by their URLs"

    proxy.requests.clear()
    again = run(*ingest(url_of(bucket), here / "store.zarr", "--key-file", key, *SMALL))
    assert again[0] == 0 and "nothing to do: 3 volumes are up to date" in again[1]
    assert len(gets_of(proxy, "dicom")) <= len(keys) + 2, "headers alone: ETags say that nothing changed"


def test_an_object_that_was_replaced_is_noticed(sources, undisturbed, bucket, here):
    _, key = undisturbed
    shutil.copytree(sources, here / "scans")
    upload(here / "scans", bucket, "dicom")
    words = ingest(url_of(bucket), here / "store.zarr", "--key-file", key, *SMALL)
    assert run(*words)[0] == 0
    before = {v.volume_id: v.source_hash for v in Store.open("store.zarr").volumes()}
    changed = slices_of(here / "scans", PATIENTS[0])[5]
    edit_pixel(changed)
    obstore.put(bucket_store(bucket), f"dicom/export/{changed.name}", changed.read_bytes())
    code, out, stderr = run(*words)
    assert code == 0 and "1 volume committed" in out and "2 were up to date" in out, out + stderr
    after = {v.volume_id: v.source_hash for v in Store.open("store.zarr").volumes()}
    assert before.keys() == after.keys() and sum(before[name] != after[name] for name in before) == 1


@pytest.mark.slow
def test_behind_a_bad_network_the_store_is_the_same(sources, undisturbed, bucket, proxy, here):
    """Every fifth request is throttled, fails, loses its answer, is cut or slow: listings, headers and pixels."""
    local, key = undisturbed
    upload(sources, bucket, "dicom")
    asked = iter(range(10**9))

    def fault(request):
        n = next(asked)
        return (*TRANSIENT, "slow")[n // 5 % 5] if n % 5 == 0 else None

    proxy.faults = fault
    code, out, stderr = run(*ingest(url_of(bucket), here / "store.zarr", "--key-file", key, *SMALL))
    assert code == 0, out + stderr
    same_store(Store.open("store.zarr"), local)
    assert left_behind(here) == []


@pytest.mark.parametrize("wrong", slow_but(("corrupt", "refused by the server"), ("refused by the server",)))
def test_one_bad_object_costs_one_verdict(sources, undisturbed, bucket, proxy, here, wrong):
    local, key = undisturbed
    upload(sources, bucket, "dicom")
    bad = "dicom/export/zz-bad.dcm"
    whole = slices_of(sources, PATIENTS[0])[0].read_bytes()
    obstore.put(bucket_store(bucket), bad, whole[:132] + b"\xff" * 64 if wrong == "corrupt" else whole)
    if wrong != "corrupt":
        proxy.faults = lambda request: "denied" if "zz-bad" in request.path else None
    words = ingest(url_of(bucket), here / "store.zarr", "--key-file", key, *SMALL)
    code, out, stderr = run(*words, "--accept", "stand_ins", "--json")
    assert code == 1, stderr
    found = json.loads(out)
    quarantined = [one for one in found["files"] if one["status"] == "quarantined"]
    assert [one["path"] for one in quarantined] == [f"s3://{bucket}/{bad}"]
    assert wrong == "corrupt" or (quarantined[0]["code"], "403" in quarantined[0]["detail"]) == ("unreadable", True)
    assert found["damaged_files"] == 1 and len(found["committed"]) == len(local.volumes())


def test_an_object_that_fails_while_pixels_are_read_costs_its_volume(sources, undisturbed, bucket, proxy, here):
    _, key = undisturbed
    upload(sources, bucket, "dicom")
    bad = slices_of(sources, PATIENTS[0])[3].name
    asked = iter(range(10**9))
    proxy.faults = lambda request: "denied" if bad in request.path and next(asked) else None  # the first is its header
    code, out, stderr = run(*ingest(url_of(bucket), here / "store.zarr", "--key-file", key, *SMALL, "--json"))
    assert code == 1, stderr
    found = json.loads(out)
    refused = [one for one in found["files"] if one["status"] == "quarantined"]
    assert {one["code"] for one in refused} == {"unreadable"} and len(found["committed"]) == 2
    (record,) = Store.open("store.zarr").quarantined()
    assert bucket not in record.detail and bad not in record.detail, "paths stay outside the store"
    proxy.faults = lambda request: None
    assert run(*ingest(url_of(bucket), here / "store.zarr", "--key-file", key, *SMALL))[0] == 0, "it is tried again"


def test_a_fault_of_a_moment_costs_no_volume(sources, undisturbed, bucket, proxy, here):
    """The server refuses one object, once as its header and once as a whole: no request is made again for that."""
    local, key = undisturbed
    upload(sources / "export", bucket, "dicom")
    bad = next(path.name for path in slices_of(sources, PATIENTS[0]))
    asked = iter(range(10**9))
    proxy.faults = lambda request: "denied" if bad in request.path and next(asked) in (0, 2) else None
    code, out, stderr = run(*ingest(url_of(bucket), here / "store.zarr", "--key-file", key, *SMALL))
    assert code == 0 and next(asked) >= 4, out + stderr
    made = contents(Store.open("store.zarr"))
    assert len(made) == 2 and made.items() <= contents(local).items()
    assert left_behind(here) == []


def test_a_single_scan_is_read_as_from_a_disk_and_nothing_of_it_stays(sources, bucket, here):
    upload(sources / "export", bucket, "dicom")
    for number in (1, 2):
        there, local = (read_ct(place, 4.0, volume=number) for place in (url_of(bucket), sources / "export"))
        for field in ("hu", "affine", "valid", "body"):
            assert np.array_equal(getattr(there, field), getattr(local, field))
    assert left_behind(here) == []
    with pytest.raises(UsageError, match=f"s3://{bucket}/dicom: expected one volume, found 2"):
        read_ct(url_of(bucket))
    with pytest.raises(NoInputError, match=f"s3://{bucket}/nothing: expected objects with CT"):
        read_ct(f"s3://{bucket}/nothing")


def test_parts_read_the_header_of_a_nifti_once_for_all_of_them(bucket, proxy, here):
    """A plan asks nothing of the server: what the headers claim lies in the tables of the shared scan."""
    (here / "nifti").mkdir()
    for number in range(4):
        hu = np.full((16, 16, 16), -1000, dtype=np.int16)
        hu[:, 4:12, 4:12] = np.random.default_rng(number).normal(40, 15, (16, 8, 8))
        write_nifti(here / f"nifti/{number}.nii.gz", hu, np.diag([5.0, 5.0, 5.0, 1.0]))
    upload(here / "nifti", bucket, "in")
    for part in ("0/2", "1/2"):
        words = ingest(f"s3://{bucket}/in", here / "store.zarr", "--key-file", here / "key", "--spacing", "native")
        assert run(*words, "--superpatch", 16, "--partition", part)[0] == 0
    assert len(Store.open("store.zarr").volumes()) == 4
    asked = Counter(request.path for request in gets_of(proxy, "in"))
    assert set(asked.values()) == {3}, "once for its header; once to know it and once to make it, by one part alone"


@pytest.mark.slow
def test_workers_fetch_what_they_decode(sources, undisturbed, bucket, here):
    """Nothing but names and geometry goes to other processes, which have the credentials of their environment."""
    local, key = undisturbed
    upload(sources, bucket, "dicom")
    words = ("ingest", url_of(bucket), "--out", here / "store.zarr", "--workers", 2, "--key-file", key, *SMALL)
    code, out, stderr = run(*words)
    assert code == 0, out + stderr
    same_store(Store.open("store.zarr"), local)
    assert left_behind(here) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A series whose slices are longer than what is read of a header: 32 of 320 x 320, 200 kB each."""

    folder = tmp_path_factory.mktemp("large")
    hu = np.kron(phantom_hu(), np.ones((1, 8, 8)))[:, :320, :320]
    affine = base_affine()
    affine[:, 1:3] /= 8
    write_dicom_series(folder, hu, affine, SeriesIdentity(patient="LARGE"))
    return folder


def test_a_dry_run_moves_headers_alone_and_tells_the_size(large, bucket, proxy, here):
    keys = upload(large, bucket, "dicom")
    size = sum(path.stat().st_size for path in large.iterdir())
    proxy.requests.clear()
    code, out, stderr = run(*ingest(url_of(bucket), here / "store.zarr", "--dry-run"))
    assert code == 0 and "dry run: 1 volume (" in out and " to fetch) would be made" in out, out + stderr
    asked = gets_of(proxy, "dicom")
    assert sorted(request.path.rpartition("/")[2] for request in asked) == sorted(k.rpartition("/")[2] for k in keys)
    assert bytes_asked(asked) == AHEAD * len(keys) < size / 2, "one GET of a header each"
    assert len(proxy.requests) == len(keys) + 1, "and one listing"
    assert not (here / "store.zarr").exists() and left_behind(here) == []


def zipped(folder, archive):
    """Put the files of a folder into an archive in a folder of its own; return that."""
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as made:
        for path in sorted(folder.iterdir()):
            made.write(path, f"a/{path.name}")
    return archive.parent


def test_headers_of_members_of_an_archive_are_read_by_range(large, bucket, proxy, here):
    folder = zipped(large, here / "zips" / "scan.zip")
    upload(folder, bucket, "dicom")
    code, out, stderr = run(*ingest(url_of(bucket), "dry.zarr", "--dry-run", "--json"))
    assert code == 0, stderr
    found = json.loads(out)
    assert len(found["planned"]) == 1 and found["planned_bytes"] == (folder / "scan.zip").stat().st_size
    paths = [one["path"].removeprefix(f"{url_of(bucket)}/") for one in found["files"]]
    assert sorted(paths) == ["scan.zip", *sorted(f"scan.zip/a/{path.name}" for path in large.iterdir())]
    assert bytes_asked(gets_of(proxy, "dicom")) < (folder / "scan.zip").stat().st_size / 2


def test_a_store_made_of_a_distant_archive_is_the_one_made_of_the_archive(sources, undisturbed, bucket, here):
    folder = zipped(sources / "export", here / "zips" / "scan.zip")
    upload(folder, bucket, "dicom")
    assert run(*ingest(url_of(bucket), "store.zarr", "--key-file", undisturbed[1], *SMALL))[0] == 0
    made, local = contents(Store.open("store.zarr")), contents(undisturbed[0])
    assert len(made) == 2 and made.items() <= local.items(), "as from the files that are in it"


@pytest.mark.slow
def test_killed_while_it_fetches_it_goes_on_and_leaves_nothing(sources, undisturbed, object_server, bucket, here):
    local, key = undisturbed
    upload(sources, bucket, "dicom")
    words = [str(word) for word in ingest(url_of(bucket), here / "store.zarr", "--key-file", key, *SMALL)]
    left = []
    with object_server.proxy() as proxy:
        proxy.latency = 0.02
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        for end in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
            before = set(left_behind(here))
            process = subprocess.Popen([sys.executable, "-m", "maesil", *words], env=environment)
            deadline = time.monotonic() + 120
            while process.poll() is None and before.issuperset(left_behind(here)) and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(end)
            process.wait()
            left.append(len(left_behind(here)))
    assert left[0] > 0 and left[1] == 0, "a kill leaves files, which go with the next run; Ctrl-C leaves none"
    assert run(*words)[0] == 0
    same_store(Store.open("store.zarr"), local)
    assert left_behind(here) == []


def test_a_bucket_that_cannot_be_listed_is_told_in_one_line(bucket, proxy, here, monkeypatch):
    monkeypatch.setattr("maesil.store.object_storage.PATIENCE", 4.0)
    proxy.faults = lambda request: "internal error"
    line = fails(5, *ingest(url_of(bucket), here / "store.zarr"))
    assert url_of(bucket) in line and "500" in line
    proxy.faults = lambda request: "denied"
    assert "refuses these credentials" in fails(2, *ingest(url_of(bucket), here / "store.zarr"))
    proxy.faults = lambda request: None
    assert "expected objects with CT" in fails(3, *ingest(f"s3://{bucket}/nothing", here / "store.zarr"))
    assert "expected a bucket of this name" in fails(2, *ingest("s3://no-such-bucket/dicom", here / "store.zarr"))
    assert not (here / "store.zarr").exists()


def test_no_credential_stands_in_any_file_or_message(sources, bucket, proxy, here):
    upload(sources, bucket, "dicom")
    (here / "series.csv").write_text(f"series_url\ns3://{KEY_ID}:{SECRET}@{bucket}/dicom\ns3://{bucket}/dicom\n")
    words = ("ingest", "--manifest", "series.csv", "--out", "store.zarr", "--workers", 0, "--key-file", here / "key")
    said = [run(*words, *SMALL), run("store", "info", "store.zarr", "--json")]
    proxy.faults = lambda request: "denied"
    said.append(run(*words, *SMALL))
    assert [code for code, _, _ in said] == [1, 0, 2]
    data = [path.read_bytes() for path in here.rglob("*") if path.is_file() and path.name != "series.csv"]
    for secret in (SECRET, KEY_ID):
        assert not any(secret in text for _, *texts in said for text in texts)
        assert not any(secret.encode() in one for one in data)


def test_without_out_the_store_of_a_url_is_made_in_the_cache_and_found_again(sources, bucket, proxy, here):
    upload(sources / "export", bucket, "dicom")
    words = ("ingest", url_of(bucket), "--workers", 0, "--key-file", here / "key", *SMALL)
    assert run(*words)[0] == 0
    proxy.requests.clear()
    code, _, stderr = run(*words)
    assert code == 0 and "found in the cache as dicom-4mm" in stderr, stderr
    assert gets_of(proxy, "dicom") == [], "the listing alone says that nothing changed"
    obstore.delete(bucket_store(bucket), [f"dicom/{slices_of(sources, PATIENTS[0])[-1].name}"])
    assert "built in the cache" in run(*words)[2]


@pytest.mark.slow
def test_the_interface_takes_urls(sources, undisturbed, bucket, here):
    import maesil

    local, key = undisturbed
    upload(sources, bucket, "dicom")
    options = IngestOptions(workers=0, key_file=key, cache_folder=here / "cache")
    recipe = Recipe(superpatch=32, spacing=(4.0, 4.0, 4.0))
    summary = maesil.ingest(url_of(bucket), f"s3://{bucket}/store.zarr", recipe=recipe, options=options)
    assert len(summary.committed) == 3
    assert contents(Store.open(f"s3://{bucket}/store.zarr")) == contents(local)


def test_a_store_in_the_bucket_is_no_source(sources, bucket, here):
    upload(sources / "export", bucket, "dicom")
    assert run(*ingest(url_of(bucket), f"s3://{bucket}/dicom/store.zarr", "--key-file", "key", *SMALL))[0] == 0
    assert "expected scans, found a store" in fails(2, *ingest(f"s3://{bucket}/dicom/store.zarr", "x.zarr"))
    found = json.loads(run(*ingest(url_of(bucket), "x.zarr", "--dry-run", "--json"))[1])
    assert found["files_found"] == len(list((sources / "export").iterdir())), "nothing of the store is among them"
