"""Whatever is damaged is found, named, and never read as something else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support.stores import make_store

from maesil.errors import StoreError
from maesil.store.index import write_index
from maesil.store.reader import MAPS, SuperpatchReader
from maesil.store.records import Refusal
from maesil.store.store import Store
from maesil.store.verify import verify


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("s") / "s.zarr", [(20, 33, 16), (40, 33, 40)], superpatch=8)


@contextmanager
def altered(path: Path, content: bytes | None) -> Iterator[None]:
    """Another content, or no file at all, for a while."""
    before = path.read_bytes()
    try:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        yield
    finally:
        path.write_bytes(before)


def read_everything(store: Store) -> None:
    reader = SuperpatchReader(store)
    for volume in reader.volumes.values():
        for patch in volume.superpatches:
            reader.read_superpatch(volume.volume_id, patch.index)
        for name in MAPS:
            reader.read_map(volume.volume_id, name)


def vouched_files(store: Store) -> list[Path]:
    """Every file: shards, chunks, metadata, commits, recipes, refusals, index."""
    return sorted(path for path in store.path.rglob("*") if path.is_file())


def damage_is_seen(path: Path) -> bool:
    try:
        return bool(verify(Store.open(path)).problems)
    except StoreError:
        return True


def test_an_intact_store_has_no_problems(store):
    seen = []
    found = verify(store, lambda done, total: seen.append((done, total)))
    assert found.problems == ()
    assert (found.volumes, found.superpatches) == (2, 30 + 125)
    assert seen == [(1, 2), (2, 2)]
    read_everything(store)


@pytest.mark.parametrize(("codec", "half"), [("fast", 20), ("compact", 7), ("raw", 7)])
def test_forty_flipped_bits_are_forty_times_found(tmp_path, codec, half):
    """Half of them spread over files, half over bytes, so that shards and small records both get their share."""
    store = make_store(tmp_path / "s.zarr", [(20, 33, 16), (9, 40, 8)], superpatch=8, codec=codec)
    store.quarantine(Refusal("ab" * 16, "gap", "one slice is missing"))
    write_index(store)
    rng = random.Random(1)
    files = vouched_files(store)
    assert len({path.name for path in files} & {"zarr.json", "00000001.json", f"{'ab' * 16}.json"}) == 3
    weights = [path.stat().st_size for path in files]
    picked = rng.choices(files, k=half) + rng.choices(files, weights, k=half)
    missed = []
    for path in picked:
        data = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        with altered(path, bytes(data)):
            if not damage_is_seen(store.path):
                missed.append((path, bit))
    assert missed == []
    assert verify(store).problems == ()


def chunk_of(store: Store, kind: str) -> tuple[str, Path]:
    volume = store.volumes()[0]
    path = {"shard": volume.superpatches[-1].path}.get(kind, f"{volume.prefix}/{kind}/c/0/0/0")
    return volume.volume_id, store.path / path


@pytest.mark.parametrize("damage", [None, b"", b"12345678" * 20])
def test_a_damaged_thumbnail_is_named(store, damage):
    volume_id, path = chunk_of(store, "thumbnail")
    with altered(path, damage):
        (problem,) = verify(store).problems
    assert volume_id in problem and "thumbnail" in problem


@pytest.mark.parametrize("kind", ["shard", "valid", "body"])
@pytest.mark.parametrize("damage", ["deleted", "emptied", "cut", "flipped", "zeroed"])
def test_damaged_voxels_are_named_and_never_read(store, kind, damage):
    volume_id, path = chunk_of(store, kind)
    data = path.read_bytes()
    content = {
        "deleted": None,
        "emptied": b"",
        "cut": data[: len(data) // 2],
        "flipped": data[:10] + bytes([data[10] ^ 4]) + data[11:],
        "zeroed": bytes(len(data)),
    }[damage]
    with altered(path, content):
        problems = verify(store).problems
        assert problems and all(volume_id in problem and "\n" not in problem for problem in problems)
        with pytest.raises(StoreError, match=volume_id):
            read_everything(store)


def test_every_damaged_volume_is_listed(store):
    """One damaged commit must not hide what else is wrong."""
    first, second = store.volumes()
    with (
        altered(store.path / first.key, b"{}"),
        altered(store.path / second.superpatches[0].path, b""),
        altered(store.path / f"{second.prefix}/body/c/0/0/0", None),
    ):
        found = verify(store)
    text = "\n".join(found.problems)
    assert first.volume_id in text and "'body'" in text and "the shard was emptied" in text
    assert text.count("the shard was emptied") == 1
    assert found.volumes == 2


def test_an_index_that_leads_elsewhere_is_found(store):
    """Swapped entries with a right checksum: the commit reads right, other readers would not."""
    import struct

    import google_crc32c

    volume = store.volumes()[0]
    path = store.path / volume.superpatches[0].path
    data = path.read_bytes()
    table = 16 * len(volume.superpatches) if len(volume.superpatches) <= 64 else 16 * 64
    body, index = data[: -table - 4], data[-table - 4 : -4]
    swapped = index[16:32] + index[:16] + index[32:]
    with altered(path, body + swapped + struct.pack("<I", google_crc32c.value(swapped))):
        problems = verify(store).problems
        read_everything(store)
    assert len(problems) == 2 and all("the shard's index" in problem for problem in problems)


EDITS = {
    "fill_value": ("0/zarr.json", lambda d: d.update(fill_value=0)),
    "shape": ("0/zarr.json", lambda d: d["shape"].__setitem__(0, d["shape"][0] - 1)),
    "dtype": ("0/zarr.json", lambda d: d.update(data_type="uint16")),
    "chunks": ("0/zarr.json", lambda d: d["codecs"][0]["configuration"].update(chunk_shape=[4, 8, 8])),
    "shards": ("0/zarr.json", lambda d: d["chunk_grid"]["configuration"].update(chunk_shape=[8, 8, 8])),
    "not sharded": ("0/zarr.json", lambda d: d.update(codecs=[])),
    "null": ("0/zarr.json", lambda d: d.clear()),
    "map shape": ("valid/zarr.json", lambda d: d.update(shape=[1, 1, 1])),
    "map dtype": ("body/zarr.json", lambda d: d.update(data_type="int8")),
    "map codecs": ("body/zarr.json", lambda d: d.update(codecs=[{"name": "bytes"}])),
    "map unknown codec": ("body/zarr.json", lambda d: d["codecs"].append({"name": "evil"})),
    "map null": ("body/zarr.json", lambda d: d.clear()),
    "OME scale": ("zarr.json", lambda d: _transform(d)[0].update(scale=[1.0, 1.0, 1.0])),
    "OME origin": ("zarr.json", lambda d: _transform(d)[1].update(translation=[0.0, 0.0, 1.0])),
    "OME turn": ("zarr.json", lambda d: _scales(d)["coordinateTransformations"][0].update(TURN)),
    "OME level": ("zarr.json", lambda d: _scales(d)["datasets"].append({"path": "9"})),
    "OME absent": ("zarr.json", lambda d: d["attributes"].clear()),
}


TURN = {"type": "rotation", "rotation": [[1, 0, 0], [0, 0, 1], [0, -1, 0]]}


def _scales(document: dict) -> dict:
    return document["attributes"]["ome"]["multiscales"][0]


def _transform(document: dict) -> list[dict]:
    return _scales(document)["datasets"][0]["coordinateTransformations"][0]["transformations"]


@pytest.mark.parametrize("edit", EDITS)
def test_edited_zarr_metadata_is_found_and_named(store, edit):
    file, change = EDITS[edit]
    volume = store.volumes()[0]
    path = store.path / volume.prefix / file
    document = json.loads(path.read_bytes())
    change(document)
    with altered(path, json.dumps(document).encode()):
        problems = verify(store).problems
        assert any(volume.volume_id in problem for problem in problems)
        assert not any("\n" in problem for problem in problems)
        with suppress(StoreError):  # damage, or the right voxels; never another exception
            read_everything(store)


@pytest.mark.parametrize("file", ["zarr.json", "0/zarr.json", "valid/zarr.json", "body/zarr.json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff\xfe", b'"x"'])
def test_broken_zarr_metadata_is_found_and_named(store, file, content):
    volume = store.volumes()[0]
    with altered(store.path / volume.prefix / file, content):
        problems = verify(store).problems
        assert any(volume.volume_id in problem for problem in problems)
        with suppress(StoreError):
            read_everything(store)


def test_a_vanished_attempt_is_found(store, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store.path, copy)
    volume = store.volumes()[0]
    shutil.rmtree(copy / volume.prefix)
    assert any(volume.volume_id in problem for problem in verify(Store.open(copy)).problems)


def test_a_commit_copied_under_another_name_is_found(store, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store.path, copy)
    commit = copy / store.volumes()[0].key
    shutil.copy(commit, commit.with_name("00000002.json"))
    assert any("moved" in problem for problem in verify(Store.open(copy)).problems)
