"""What goes wrong with a bucket while a store is made or read: no room, bytes that change on their way, a full disk.

In each case the command ends with one line and its exit code, nothing half written counts, and the same command goes
on to what an undisturbed run gives.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import SMALL, ingest, run
from support.object_server import NO_ROOM, quota
from support.objects import bucket_store, upload
from support.sources import contents
from support.stores import make_store

from maesil import errors
from maesil.cache.stage import Stage
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.store.urls import place_of
from maesil.store.verify import verify


def url_of(bucket):
    return f"s3://{bucket}/stores/store.zarr"


def error_of(stderr):
    """The line of the error, which is the last one; what stands before it tells of progress."""
    *progress, line = [line for line in stderr.splitlines() if line.strip()]
    assert line.startswith("error: ") and not any(one.startswith(("error: ", "Traceback")) for one in progress), stderr
    return line


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("maesil.store.object_storage.PATIENCE", 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", NO_ROOM)
def test_a_bucket_that_fills_up_ends_in_one_line_and_the_same_command_goes_on(
    sources, undisturbed, bucket, proxy, here, impatient, fault
):
    local, key = undisturbed
    size = sum(local.storage.size(name) for name in local.storage.list("volumes"))
    words = ingest(sources, url_of(bucket), "--key-file", key, *SMALL)
    for share in (0.0, 0.2, 0.5):
        proxy.faults = quota(int(share * size), fault)
        code, _, stderr = run(*words)
        assert code == errors.EXIT_RESOURCES and "the storage is full" in error_of(stderr), (share, stderr)
        proxy.faults = lambda request: None
        if bucket_store(bucket).list("stores/store.zarr/zarr.json").collect():
            held = Store.open(url_of(bucket))
            assert verify(held).problems == () and contents(held).items() <= contents(local).items()
    code, out, stderr = run(*words)
    assert code == 0, out + stderr
    store = Store.open(url_of(bucket))
    assert contents(store) == contents(local) and verify(store).problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["/0/c/", "/valid/c/", "/0/zarr.json"])
def test_bytes_that_change_on_their_way_to_the_bucket_are_not_committed(
    sources, undisturbed, bucket, proxy, here, part
):
    local, key = undisturbed
    words = ingest(sources, url_of(bucket), "--key-file", key, *SMALL)
    flipped = []

    def fault(request):
        if request.method == "PUT" and part in request.path and not flipped:
            flipped.append(request)
            return "flipped"
        return None

    proxy.faults = fault
    code, _, stderr = run(*words)
    assert flipped and code == errors.EXIT_STORE and error_of(stderr)
    assert verify(Store.open(url_of(bucket))).problems == ()
    assert run(*words)[0] == 0
    store = Store.open(url_of(bucket))
    assert contents(store) == contents(local) and verify(store).problems == ()


def test_bytes_that_change_on_their_way_here_are_damage_and_are_not_staged(bucket, proxy, here):
    store = make_store(place_of(url_of(bucket)), [(32, 32, 32)], superpatch=16)
    (volume,) = store.volumes()
    stage, index = Stage(Path("stage"), 10**9), volume.superpatches[3].index
    readers = SuperpatchReader(store), SuperpatchReader(store, stage.over(store.storage))
    proxy.faults = lambda request: "flipped" if "/0/c/" in request.path else None
    for reader in readers:
        with pytest.raises(errors.StoreError, match=volume.volume_id):
            reader.read_superpatch(volume.volume_id, index)
    assert verify(store).problems and stage.used == 0
    proxy.faults = lambda request: None
    first, second = (reader.read_superpatch(volume.volume_id, index) for reader in readers)
    assert (first == second).all() and verify(store).problems == () and stage.used > 0


@pytest.mark.slow
def test_a_full_disk_below_the_stage_ends_training_in_one_line(bucket, mount, here):
    make_store(place_of(url_of(bucket)), [(64, 64, 64), (64, 64, 64)], superpatch=32)
    place = mount("mount", "-t", "tmpfs", "-o", "size=100k", "none", "PLACE")
    words = (
        "train", url_of(bucket), "--preset", "tiny", "--out", "run", "--steps", 2, "--batch", 2, "--device", "cpu",
        "--set", "model.crop=32", "--validation", 0.5, "--stage-size", "1GB", "--stage",
    )  # fmt: skip
    code, _, stderr = run(*words, place / "stage")
    assert code == errors.EXIT_RESOURCES and "--stage-size: " in error_of(stderr) and "disk is full" in stderr
    for path in (place / "stage").glob("??/*"):
        assert path.stat().st_size > 0 and not path.name.startswith("."), "nothing that is half written"
    assert run(*words, here / "stage", "--resume", "auto")[0] == 0


def test_a_disk_too_small_for_what_is_fetched_is_told_and_left_empty(sources, bucket, mount, here, monkeypatch):
    import tempfile

    upload(sources / "export", bucket, "dicom")
    place = mount("mount", "-t", "tmpfs", "-o", "size=60k", "none", "PLACE")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    code, _, stderr = run(*ingest(f"s3://{bucket}/dicom", "store.zarr", "--key-file", "key", *SMALL))
    assert code == errors.EXIT_RESOURCES and "room for the" in error_of(stderr)
    assert [path for path in place.glob("*/*") if path.name != ".lock"] == []
    assert not Store.open("store.zarr").volumes()
