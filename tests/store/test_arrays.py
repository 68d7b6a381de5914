from __future__ import annotations

import json
from dataclasses import replace

import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs import zstd
from support.stores import cells, make_store, synthetic_hu

from maesil.errors import StoreError
from maesil.store.arrays import read_small_array
from maesil.store.store import Store

SHAPE = (20, 24, 40)


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "s", [SHAPE], superpatch=16)
    return Store.open(tmp_path / "s")


@pytest.mark.parametrize("name", ["valid", "body", "thumbnail"])
def test_it_reads_what_zarr_python_does(store, name):
    (volume,) = store.volumes()
    array = zarr.open_array(store.path / volume.prefix / name, mode="r")
    np.testing.assert_array_equal(read_small_array(store.storage, volume, name), array[:])


def test_the_maps_are_the_shares_of_the_cells(store):
    (volume,) = store.volumes()
    np.testing.assert_array_equal(read_small_array(store.storage, volume, "valid"), cells(np.ones(SHAPE, bool)))
    np.testing.assert_array_equal(read_small_array(store.storage, volume, "body"), cells(synthetic_hu(SHAPE) > -950))


def test_metadata_that_was_not_committed_is_refused(store):
    (volume,) = store.volumes()
    path = store.path / volume.prefix / "body/zarr.json"
    path.write_bytes(path.read_bytes() + b" ")  # the same to a JSON parser
    with pytest.raises(StoreError, match="not what was committed"):
        read_small_array(store.storage, volume, "body")


@pytest.mark.parametrize("codec", [{"name": "gzip", "configuration": {"level": 1}}, {"name": "vlen-utf8"}])
def test_a_codec_outside_the_allow_list_is_refused_whatever_vouches_for_it(store, codec):
    (volume,) = store.volumes()
    path = store.path / volume.prefix / "body/zarr.json"
    document = json.loads(path.read_bytes())
    document["codecs"][1] = codec
    path.write_text(json.dumps(document))
    crc = google_crc32c.value(path.read_bytes())
    vouched = replace(volume, documents=volume.documents | {"body/zarr.json": crc})
    with pytest.raises(StoreError, match=f"expected the codecs bytes, zstd, crc32c, found bytes, {codec['name']}"):
        read_small_array(store.storage, vouched, "body")


def test_a_missing_chunk_is_no_map_of_zeros(store):
    (volume,) = store.volumes()
    (store.path / volume.prefix / "body/c/0/0/0").unlink()
    assert not zarr.open_array(store.path / volume.prefix / "body", mode="r")[:].any(), "what Zarr would say"
    with pytest.raises(StoreError, match="its chunk is missing"):
        read_small_array(store.storage, volume, "body")


def sealed(payload: bytes) -> bytes:
    return payload + google_crc32c.value(payload).to_bytes(4, "little")


@pytest.mark.parametrize(
    "chunk",
    [
        b"", b"123", b"\0" * 40, sealed(b""), sealed(b"no zstd at all"), sealed(zstd.compress(b"\xff" * 44, 3)),
        sealed(zstd.compress(b"\xff" * 46, 3)), sealed(zstd.compress(b"\xff" * 45, 3))[:-1],
    ],
)  # fmt: skip
def test_a_damaged_chunk_or_one_of_another_size_is_a_store_error(store, chunk):
    (volume,) = store.volumes()
    path = store.path / volume.prefix / "valid/c/0/0/0"
    assert read_small_array(store.storage, volume, "valid").size == 45
    path.write_bytes(chunk)
    with pytest.raises(StoreError, match="damaged"):
        read_small_array(store.storage, volume, "valid")


def test_every_flipped_bit_of_a_chunk_is_found(store):
    (volume,) = store.volumes()
    path = store.path / volume.prefix / "body/c/0/0/0"
    intact = path.read_bytes()
    for bit in range(8 * len(intact)):
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(StoreError):
            read_small_array(store.storage, volume, "body")


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b"[1]", b'{"codecs": 3}'])
def test_any_other_damage_is_a_store_error(store, damage):
    (volume,) = store.volumes()
    path = store.path / volume.prefix / "valid/zarr.json"
    path.write_bytes(damage)
    vouched = replace(volume, documents=volume.documents | {"valid/zarr.json": google_crc32c.value(damage)})
    with pytest.raises(StoreError, match="damaged"):
        read_small_array(store.storage, vouched, "valid")
