"""Shard files: the codecs round trip, and what is cut, absent or foreign is named."""

from __future__ import annotations

import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import make_store

from maesil.errors import StoreError
from maesil.store.local_storage import LocalStorage
from maesil.store.recipe import CODECS
from maesil.store.shard import (
    check_and_decode,
    compressors,
    decode_superpatch,
    encode,
    locate,
    read_shard_index,
    shard_entry,
    shard_parts,
    tiles_per_shard,
)

grids = st.tuples(*[st.integers(1, 12)] * 3)


@settings(max_examples=50, deadline=None)
@given(grids)
def test_every_tile_has_a_place_of_its_own(grid):
    per_shard = tiles_per_shard(grid)
    assert 1 <= np.prod(per_shard) <= 64
    assert np.prod(grid) > 64 or per_shard == grid
    places = {locate(index, per_shard) for index in np.ndindex(*grid)}
    assert len(places) == np.prod(grid)
    assert all(0 <= i < n for _, inner in places for i, n in zip(inner, per_shard, strict=True))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("s") / "s.zarr", [(20, 33, 16)], superpatch=16)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("seed", range(3))
def test_superpatches_are_encoded_as_zarr_encodes_them(tmp_path, codec, seed):
    tile = superpatch(seed)
    array = zarr.create_array(
        tmp_path,
        shape=tile.shape,
        chunks=tile.shape,
        dtype="int16",
        compressors=compressors(codec),
        filters=None,
        config={"write_empty_chunks": True},
    )
    array[...] = tile
    compressed, crc = encode(tile, codec)
    assert (tmp_path / "c/0/0/0").read_bytes() == compressed + crc
    assert google_crc32c.value(compressed) == struct.unpack("<I", crc)[0]
    out = np.empty_like(tile)
    check_and_decode(np.frombuffer(compressed + crc, np.uint8), google_crc32c.value(compressed), codec, out, "here")
    np.testing.assert_array_equal(out, tile)


def superpatch(seed: int) -> np.ndarray:
    """Smooth, noisy or empty."""
    rng = np.random.default_rng(seed)
    noise = (0, 2000, 30)[seed] * rng.random((16, 16, 16))
    return np.rint(noise + seed * 100 * np.sin(np.arange(16) / 3)).astype(np.int16)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 4)] * 3), st.sampled_from(CODECS), st.data())
def test_zarr_finds_each_superpatch_of_a_shard_where_it_belongs(per_shard, codec, data):
    """In whatever order they were written; those that were not are fill values to it, and an error here."""
    places = list(np.ndindex(per_shard))
    written = data.draw(st.lists(st.sampled_from(places), unique=True))
    voxels = {inner: np.full((8, 8, 8), number, np.int16) for number, inner in enumerate(written)}
    with tempfile.TemporaryDirectory() as folder:
        shape = tuple(8 * n for n in per_shard)
        array = zarr.create_array(
            folder, shape=shape, shards=shape, chunks=(8, 8, 8), dtype="int16", compressors=compressors(codec),
            fill_value=-1024,
        )  # fmt: skip
        parts = shard_parts(per_shard, ((inner, encode(hu, codec)) for inner, hu in voxels.items()))
        LocalStorage(Path(folder)).put_parts("c/0/0/0", parts)
        table = read_shard_index(LocalStorage(Path(folder)), "c/0/0/0", per_shard)
        found = array[...]
    for inner in places:
        there = found[tuple(slice(8 * i, 8 * i + 8) for i in inner)]
        np.testing.assert_array_equal(there, voxels.get(inner, np.int16(-1024)))
        if inner not in voxels:
            with pytest.raises(StoreError, match="missing"):
                shard_entry(table, inner, "here")


def test_an_index_leads_zarr_and_the_commit_to_the_same_bytes(store):
    volume = store.volumes()[0]
    per_shard = tiles_per_shard(volume.grid)
    for patch in volume.superpatches:
        shard, inner = locate(patch.index, per_shard)
        assert patch.path == f"{volume.prefix}/0/{shard}"
        table = read_shard_index(store.storage, patch.path, per_shard)
        assert shard_entry(table, inner, "here") == (patch.offset, patch.length)


@pytest.mark.parametrize("size", [0, 10, 99])
def test_an_emptied_shard_is_named(tmp_path, size):
    LocalStorage(tmp_path).put_new("c/0", bytes(size))
    with pytest.raises(StoreError, match="c/0: expected at least 100 bytes, found"):
        read_shard_index(LocalStorage(tmp_path), "c/0", (1, 2, 3))


def test_an_absent_chunk_is_named(tmp_path):
    table = np.full((1, 1, 1, 2), 2**64 - 1, "<u8").tobytes()
    LocalStorage(tmp_path).put_new("c/0", table + struct.pack("<I", google_crc32c.value(table)))
    found = read_shard_index(LocalStorage(tmp_path), "c/0", (1, 1, 1))
    with pytest.raises(StoreError, match="tile 7: missing"):
        shard_entry(found, (0, 0, 0), "tile 7")


def test_a_codec_outside_the_list_is_refused(store):
    patch = store.volumes()[0].superpatches[0]
    with pytest.raises(StoreError, match="pickle"):
        decode_superpatch(store.storage, patch, "pickle", np.empty((16,) * 3, np.int16), "here")


@pytest.mark.parametrize("codec", ["compact", "raw"])
def test_a_commit_with_another_codec_decodes_or_is_refused(store, codec):
    """Blosc names its own compressor inside; raw bytes of the wrong length are refused."""
    volume = store.volumes()[0]
    patch, out = volume.superpatches[0], np.empty((16,) * 3, np.int16)
    if codec == "raw":
        with pytest.raises(StoreError, match="decoded bytes"):
            decode_superpatch(store.storage, patch, codec, out, "here")
    else:
        decode_superpatch(store.storage, patch, codec, out, "here")
        right = np.empty_like(out)
        decode_superpatch(store.storage, patch, volume.codec, right, "here")
        np.testing.assert_array_equal(out, right)


def test_a_chunk_of_another_size_is_refused(store):
    patch = store.volumes()[0].superpatches[0]
    with pytest.raises(StoreError, match=r"here, volumes.*: expected 65536 decoded bytes, found 8192"):
        decode_superpatch(store.storage, patch, "fast", np.empty((32,) * 3, np.int16), "here")


def test_bytes_of_another_place_are_refused(store):
    first, second = store.volumes()[0].superpatches[:2]
    moved = replace(first, offset=second.offset, length=second.length)
    with pytest.raises(StoreError, match="checksum"):
        decode_superpatch(store.storage, moved, "fast", np.empty((16,) * 3, np.int16), "here")
