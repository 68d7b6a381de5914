"""Objects as sources: streams of ranges, headers fetched ahead, whole objects brought here and taken away again."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import obstore
import pytest
from support.objects import bucket_store, gets_of, range_of

from maesil.errors import NoInputError, Refused, ResourceError
from maesil.ingest import fetched, objects
from maesil.ingest.fetched import brought_here
from maesil.ingest.objects import AHEAD, fetch, listed, objects_below, open_object, with_heads
from maesil.ingest.source import Source
from maesil.ingest.source_file import is_there, open_source, stamp_of
from maesil.ingest.source_path import ObjectFile, common_folder, source_path
from maesil.store.urls import ObjectUrl


def put(bucket: str, key: str, data: bytes) -> None:
    obstore.put(bucket_store(bucket), key, data)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A folder of its own for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def one(bucket: str, key: str) -> ObjectFile:
    (file,) = objects_below(ObjectUrl("s3", bucket, key))
    return file


def test_a_listing_is_sorted_and_leaves_zarr_folders_out(bucket):
    for key in ("d/b", "d/a/2", "d/a/1", "d/x.zarr/zarr.json", "d/x.zarr/c/0", "d/x.zarr2", "other"):
        put(bucket, key, key.encode())
    found = objects_below(ObjectUrl("s3", bucket, "d"))
    assert [file.folder for file in found] == ["d/a/1", "d/a/2", "d/b", "d/x.zarr2"]
    assert [file.size for file in found] == [5, 5, 3, 9] and len({file.stamp for file in found}) == 4
    assert one(bucket, "d/b") == found[2] and one(bucket, "d/b").size == 3, "an object may be named by itself"
    missing = []
    places = [ObjectUrl("s3", bucket, name) for name in ("d/a", "nothing", "d/b")]
    there = listed(places, lambda place, error: missing.append((place.name, type(error))))
    assert [place.name for place in there] == ["a", "b"] and missing == [("nothing", NoInputError)]


def test_a_stream_of_ranges_reads_what_the_object_holds(bucket, proxy):
    data = noise(5 * AHEAD + 123)
    put(bucket, "d/one", data)
    with open_source(one(bucket, "d/one")) as stream:
        assert stream.read(100) == data[:100] and stream.read(100) == data[100:200]
        assert len(gets_of(proxy, "d")) == 1, "what was read ahead is not asked for again"
        stream.seek(-50, os.SEEK_END)
        assert stream.read() == data[-50:] and stream.read(1) == b""
        stream.seek(3 * AHEAD)
        assert stream.read(2 * AHEAD) == data[3 * AHEAD : 5 * AHEAD]
        stream.seek(7 * AHEAD)
        assert stream.read(10) == b""
    assert max(end for _, end in map(range_of, gets_of(proxy, "d"))) == len(data)


def test_headers_are_fetched_ahead_many_at_once_and_read_once(bucket, proxy):
    names = [f"d/{number:03d}" for number in range(60)]
    for number, name in enumerate(names):
        put(bucket, name, noise(2 * AHEAD if number % 2 else 1000, number))
    proxy.latency = 0.05
    proxy.requests.clear()
    for number, file in enumerate(with_heads(objects_below(ObjectUrl("s3", bucket, "d")))):
        assert file.folder == names[number]
        for _ in range(3):
            with open_object(file) as stream:
                assert stream.read(500) == noise(2 * AHEAD if number % 2 else 1000, number)[:500]
    assert len(gets_of(proxy, "d")) == 60 and proxy.most_in_flight > 8
    assert objects._heads == {}, "nothing of them stays"


def test_local_files_pass_between_objects_in_their_order(bucket, tmp_path):
    put(bucket, "d/a", b"a")
    files = [tmp_path / "1", one(bucket, "d/a"), tmp_path / "2"]
    assert list(with_heads(files)) == files


def test_large_objects_are_fetched_in_pieces_and_checked(bucket, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "_PIECE", 1000)
    contents = {"d/a": noise(25_500), "d/b": b"", "d/c": noise(999)}
    for key, data in contents.items():
        put(bucket, key, data)
    proxy.latency = 0.02
    proxy.requests.clear()
    fetch([(one(bucket, key), tmp_path / key[-1]) for key in contents])
    assert {key: (tmp_path / key[-1]).read_bytes() for key in contents} == contents
    assert proxy.most_in_flight > 4 and len(gets_of(proxy, "d/a")) == 0
    before = one(bucket, "d/a")
    put(bucket, "d/a", noise(25_500, 1))
    with pytest.raises(Refused, match="replaced since it was listed"):
        fetch([(before, tmp_path / "again")])


def test_an_object_that_is_gone_or_refused_is_refused_by_its_code(bucket, proxy):
    put(bucket, "d/gone", noise(2 * AHEAD))
    put(bucket, "d/kept", noise(2 * AHEAD))
    gone, kept = objects_below(ObjectUrl("s3", bucket, "d"))
    obstore.delete(bucket_store(bucket), ["d/gone"])
    proxy.faults = lambda request: "denied" if "kept" in request.path else None
    for file, code in ((gone, "vanished"), (kept, "unreadable")):
        with pytest.raises(Refused) as refused, open_object(file) as stream:
            stream.read(1)
        assert refused.value.code == code and str(file) not in refused.value.detail
    assert not is_there(ObjectFile("s3", bucket, "d/gone"))


def test_a_server_that_answers_nobody_ends_the_run(bucket, proxy, monkeypatch):
    monkeypatch.setattr("maesil.store.object_storage.PATIENCE", 3.0)
    put(bucket, "d/a", b"a")
    file = one(bucket, "d/a")
    proxy.faults = lambda request: "internal error"
    with pytest.raises(ResourceError, match="does not answer as it should"), open_object(file) as stream:
        stream.read(1)


def test_objects_are_brought_here_for_as_long_as_they_are_needed(bucket, temporary):
    put(bucket, "scan of SMITH/x.y.hdr", b"header")
    put(bucket, "scan of SMITH/x.y.img.gz", b"image")
    header = one(bucket, "scan of SMITH/x.y.hdr")
    pair = Source("nifti", (header, header.with_suffix(".img.gz")))
    assert [stamp_of(path)[0] for path in pair.paths] == [6, 5]
    assert is_there(pair.paths[1])
    with brought_here(pair) as here:
        assert [path.name for path in here.paths] == ["scan.hdr", "scan.img.gz"]
        assert [Path(path).read_bytes() for path in here.paths] == [b"header", b"image"]
        assert not any("SMITH" in str(path) for path in temporary.rglob("*"))
        assert all(path.stat().st_mode & 0o077 == 0 for path in temporary.rglob("*") if path.is_dir())
        folder = Path(here.paths[0]).parent
    assert not folder.exists()
    local = Source("nifti", (temporary / "a.nii",))
    with brought_here(local) as here:
        assert here is local


KILLED = """
import os, signal, sys
from maesil.ingest import fetched
with fetched._folder(10) as folder:
    (folder / "0").write_bytes(b"pixels")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_with_the_next_and_what_another_uses_stays(temporary):
    environment = {**os.environ, "TMPDIR": str(temporary)}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True)
    left = Path(killed.stdout.strip())
    assert (left / "0").exists()
    with fetched._folder(10) as first, fetched._folder(10) as second:
        assert not left.exists() and first.is_dir() and second.is_dir()


def test_a_source_larger_than_the_disk_is_told_before_it_is_fetched(temporary):
    with pytest.raises(ResourceError, match="set TMPDIR to a folder with more"), fetched._folder(1 << 60):
        pass


def test_a_folder_that_others_can_read_is_refused(temporary):
    (temporary / f"maesil-fetched-{os.getuid()}").mkdir()
    (temporary / f"maesil-fetched-{os.getuid()}").chmod(0o755)
    with pytest.raises(ResourceError, match="only you can read"), fetched._folder(1):
        pass


def test_names_in_tables_lead_back_to_files_and_objects():
    file = ObjectFile("s3", "bucket", "a/b c.nii.gz")
    assert source_path(str(file)) == file and source_path("/a/s3") == Path("/a/s3")
    assert (file.suffix, str(file.parent), file.name) == (".gz", "s3://bucket/a", "b c.nii.gz")
    assert file.with_suffix("").with_suffix(".hdr").folder == "a/b c.hdr"
    folders = [ObjectUrl("s3", "bucket", "a/b"), ObjectUrl("s3", "bucket", "a/c")]
    assert common_folder(folders) == "s3://bucket/a" and common_folder([Path("/x/y"), Path("/x/z")]) == "/x"
    assert common_folder([Path("/x"), folders[0]]) == "several places"
