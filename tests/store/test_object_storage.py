"""Object storage behind a bad network: what is done again, what is told, and what is never half done."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
from support.object_server import KEY_ID, NO_ROOM, SECRET, now_and_then

from maesil.errors import ResourceError, StoreError, UsageError
from maesil.store.backends import open_storage
from maesil.store.object_storage import ObjectStorage
from maesil.store.store import Store
from maesil.store.urls import place_of

TRANSIENT = ("slow down", "internal error", "lost answer", "cut body", "slow")
MEGABYTE = 1 << 20


@pytest.fixture
def storage(proxy, bucket):
    return ObjectStorage(place_of(f"s3://{bucket}/store.zarr"), patience=20.0)


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_passes_is_tried_again_and_nobody_notices(storage, proxy, fault):
    data = os.urandom(MEGABYTE)
    proxy.faults = now_and_then(2, fault)
    assert storage.put_new("a", data)
    storage.put("b", data[::-1])
    assert storage.read("a") == data and storage.read("b") == data[::-1]
    assert storage.read_range("a", 1000, 5000) == data[1000:6000]
    assert list(storage.list("")) == ["a", "b"] and storage.exists("a") and not storage.exists("c")
    storage.remove("b")
    assert list(storage.list("")) == ["a"]
    assert len(proxy.requests) > 10


@pytest.mark.parametrize("fault", ["slow down", "internal error", "lost answer"])
def test_a_record_whose_answer_was_lost_is_still_its_writers(storage, proxy, fault):
    for number in range(6):
        proxy.faults = now_and_then(10**6, fault)  # the first request of each put, and no other
        assert storage.put_new(f"commits/{number}", f"of this writer, {number}".encode())
        assert not storage.put_new(f"commits/{number}", f"of another, {number}".encode())
        assert storage.read(f"commits/{number}") == f"of this writer, {number}".encode()


def test_a_writer_whose_answer_was_lost_does_not_take_anothers_record_for_its_own(storage, proxy):
    assert storage.put_new("record", b"same bytes")
    proxy.faults = now_and_then(10**6, "lost answer")
    assert not storage.put_new("record", b"same bytes")


@pytest.mark.parametrize("fault", ["slow down", "internal error"])
def test_a_server_that_stays_away_is_told_within_bounded_time(proxy, bucket, fault):
    storage = ObjectStorage(place_of(f"s3://{bucket}/store.zarr"), patience=1.0)
    proxy.faults = lambda request: fault
    for act in (lambda: storage.read("a"), lambda: storage.put_new("a", b"1"), lambda: list(storage.list(""))):
        began = time.monotonic()
        with pytest.raises(ResourceError, match=rf"{bucket}/store.zarr.*does not answer as it should \(50\d") as told:
            act()
        assert time.monotonic() - began < 8
        assert "\n" not in str(told.value)


def test_nobody_listens_is_told_within_bounded_time(monkeypatch, bucket):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage = ObjectStorage(place_of(f"s3://{bucket}/store.zarr"), patience=1.0)
    with pytest.raises(ResourceError, match="does not answer"):
        storage.read("a")


def test_a_server_that_ignores_the_condition_is_found_out(storage, proxy):
    proxy.faults = lambda request: "ignore condition"
    with pytest.raises(UsageError, match=r"--out: s3://.*ignores If-None-Match"):
        storage.require_writable("--out")
    proxy.faults = lambda request: None
    assert not list(storage.temporaries())


def test_many_parts_become_one_object_by_parallel_uploads(storage, proxy, object_server, bucket):
    parts = [os.urandom(3 * MEGABYTE) for _ in range(9)]
    proxy.faults = now_and_then(3, *TRANSIENT[:3])
    storage.put_parts("c/0", iter(parts))
    assert storage.read("c/0") == b"".join(parts)
    assert proxy.of("POST", "uploads") and not object_server.uploads(bucket)
    with pytest.raises(FileExistsError):
        storage.put_parts("c/0", [b"other"])


def test_an_upload_whose_parts_fail_is_aborted(storage, object_server, bucket):
    def parts():
        yield from (bytes(5 * MEGABYTE) for _ in range(5))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        storage.put_parts("c/0", parts())
    assert not object_server.uploads(bucket) and not list(storage.list(""))


def test_an_upload_that_the_server_refuses_is_aborted(proxy, bucket, object_server):
    storage = ObjectStorage(place_of(f"s3://{bucket}/store.zarr"), patience=1.0)
    proxy.faults = lambda request: "internal error" if "partNumber=2" in request.path else None
    with pytest.raises(ResourceError, match="c/0"):
        storage.put_parts("c/0", (bytes(9 * MEGABYTE) for _ in range(3)))
    assert proxy.of("DELETE", "uploadId")
    assert not object_server.uploads(bucket) and not list(storage.list(""))


def test_a_bucket_that_is_not_there_is_told(bucket):
    with pytest.raises(UsageError, match=r"s3://no-such-bucket-here/store\.zarr: expected a bucket"):
        open_storage("s3://no-such-bucket-here/store.zarr").read("zarr.json")
    with pytest.raises(UsageError, match="expected a bucket"):
        Store.open("s3://no-such-bucket-here/store.zarr")
    with pytest.raises(UsageError, match=r"--out: .* expected a bucket"):
        open_storage("s3://no-such-bucket-here/store.zarr").require_writable("--out")


def test_a_further_name_is_made_by_the_server_and_no_byte_comes_here(storage, proxy):
    storage.put_parts("one", (bytes(6 * MEGABYTE) for _ in range(3)))
    proxy.requests.clear()
    storage.link("one", "two")
    assert storage.size("two") == 18 * MEGABYTE and not proxy.of("GET", "one")


def test_a_forked_process_is_told_to_start_another_way(storage):
    storage.put_new("a", b"1")

    def use(told) -> None:
        try:
            storage.read("a")
        except RuntimeError as error:
            told.put(str(error))

    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()
    process = context.Process(target=use, args=(told,))
    process.start()
    process.join(20)
    assert process.exitcode == 0 and "forkserver" in told.get()


def test_the_zarr_view_tells_errors_as_the_storage_does(storage, proxy, bucket):
    import zarr

    zarr.create_group(storage.zarr("volumes/a", read_only=False), attributes={"a": 1})
    assert list(storage.list("")) == ["volumes/a/zarr.json"]
    storage = ObjectStorage(place_of(f"s3://{bucket}/store.zarr"), patience=1.0)
    proxy.faults = lambda request: "internal error" if request.method == "PUT" else None
    with pytest.raises(ResourceError, match="does not answer"):
        zarr.create_group(storage.zarr("volumes/b", read_only=False))


@pytest.mark.parametrize("fault", TRANSIENT)
def test_an_array_is_written_through_the_zarr_view_behind_a_bad_network(storage, proxy, fault):
    import numpy as np
    import zarr

    proxy.faults = now_and_then(2, fault)
    group = zarr.create_group(storage.zarr("volumes/a", read_only=False), attributes={"a": 1})
    values = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    array = group.create_array("x", shape=values.shape, chunks=values.shape, dtype="uint8")
    array[...] = values
    found = zarr.open_group(storage.zarr("volumes/a", read_only=True), mode="r")
    assert dict(found.attrs) == {"a": 1} and np.array_equal(found["x"][...], values)


@pytest.mark.parametrize("act", ["read", "put_new", "list"])
def test_refused_credentials_are_told_and_not_repeated(monkeypatch, object_server, bucket, act):
    class Refusing:
        def __call__(self, request):
            return "denied"

    with object_server.proxy() as proxy:
        proxy.faults = Refusing()
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(f"s3://{bucket}/store.zarr")
        arguments = {"read": ("a",), "put_new": ("a", b"1"), "list": ("a",)}[act]
        with pytest.raises(UsageError, match=r"refuses these credentials \(403 Forbidden") as told:
            list(getattr(storage, act)(*arguments))
    assert SECRET not in str(told.value) and KEY_ID not in str(told.value)


@pytest.mark.parametrize("fault", NO_ROOM)
def test_a_server_without_room_is_told_and_what_is_there_can_go(proxy, bucket, fault):
    storage = ObjectStorage(place_of(f"s3://{bucket}/store.zarr"), patience=1.0)
    storage.put_new("c/old", b"1")
    proxy.faults = lambda request: fault if request.method == "PUT" or "uploadId" in request.path else None
    big = (bytes(9 * MEGABYTE) for _ in range(3))
    for act in (
        lambda: storage.put_new("c/new", b"2"), lambda: storage.put("c/new", b"2"),
        lambda: storage.put_parts("c/new", [b"2"]), lambda: storage.put_parts("c/new", big),
    ):  # fmt: skip
        with pytest.raises(ResourceError, match=rf"{bucket}/store.zarr/c/new: the storage is full \(\d+ ") as told:
            act()
        assert "\n" not in str(told.value) and "credentials" not in str(told.value)
    assert list(storage.list("")) == ["c/old"]
    storage.remove("c/old")
    assert list(storage.list("")) == []


def test_a_damaged_range_is_a_damaged_store(storage):
    storage.put_new("f", bytes(100))
    with pytest.raises(StoreError, match="the file was cut"):
        storage.read_range("f", 50, 51)


@pytest.mark.parametrize("endpoint", ["localhost:9000", "SECRET", "https://", "http://host:port", "http://a host"])
def test_an_endpoint_that_is_no_url_is_told_in_one_line_and_not_repeated(monkeypatch, endpoint):
    """obstore would panic."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL: expected https://HOST") as told:
        open_storage("s3://bucket/folder").exists("key")
    assert endpoint == "https://" or endpoint not in str(told.value)
