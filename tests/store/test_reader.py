"""The fast reader against zarr-python, which reads the same files in its own way."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc
from support.lanes import slow_but
from support.stores import add_volume, make_store, synthetic_hu

from maesil.errors import StoreError
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import CODECS
from maesil.store.store import Store
from maesil.types import AIR_HU

SHAPES = [(1, 1, 1), (16, 16, 16), (17, 31, 8), (40, 36, 33), (3, 70, 9), (130, 4, 4)]
"""One voxel, tiles in full, odd edges, 125 tiles in 8 shards, a plane, 17 tiles in a row (at edge 8)."""


@pytest.fixture(scope="module", params=CODECS)
def store(request, tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp(request.param) / "s.zarr"
    return make_store(path, SHAPES, superpatch=8, codec=request.param)


def oracle(store: Store, volume) -> np.ndarray:
    """The whole volume by zarr-python alone."""
    return zarr.open_group(store.path / volume.prefix, mode="r")["0"][...]


def padded(array: np.ndarray, start, size, fill) -> np.ndarray:
    """Any box of an array, by padding it generously."""
    margin = [(max(0, -s), max(0, s + n - have)) for s, n, have in zip(start, size, array.shape, strict=True)]
    grown = np.pad(array, margin, constant_values=fill)
    return grown[tuple(slice(s + m[0], s + m[0] + n) for s, n, m in zip(start, size, margin, strict=True))]


def test_some_volumes_have_several_shards(store):
    shards = [len({patch.path for patch in volume.superpatches}) for volume in store.volumes()]
    assert sorted(shards) == [1, 1, 1, 1, 1, 8]


def test_superpatches_equal_zarr(store):
    reader = SuperpatchReader(store)
    for volume in store.volumes():
        whole = oracle(store, volume)
        assert whole.shape == volume.shape and whole.dtype == np.int16
        assert [patch.index for patch in volume.superpatches] == list(product(*(range(n) for n in volume.grid)))
        for patch in volume.superpatches:
            start = tuple(8 * i for i in patch.index)
            expected = padded(whole, start, (8, 8, 8), AIR_HU)
            np.testing.assert_array_equal(reader.read_superpatch(volume.volume_id, patch.index), expected)


def test_stored_voxels_are_those_given(store):
    reader = SuperpatchReader(store)
    given_hu = {shape: synthetic_hu(shape, number) for number, shape in enumerate(SHAPES)}
    for volume in store.volumes():
        np.testing.assert_array_equal(
            reader.read_region(volume.volume_id, (0, 0, 0), volume.shape), given_hu[volume.shape]
        )


boxes = st.tuples(st.tuples(*[st.integers(-20, 45)] * 3), st.tuples(*[st.integers(0, 30)] * 3))


@settings(max_examples=150, deadline=None)
@given(box=boxes, codec=st.sampled_from(CODECS))
def test_any_box_equals_a_padded_slice(box_stores, codec, box):
    reader, whole, volume_id = box_stores[codec]
    start, size = box
    out = np.full(size, 77, np.int16)
    found = reader.read_region(volume_id, start, size, out)
    assert found is out
    np.testing.assert_array_equal(found, padded(whole, start, size, AIR_HU))


@settings(max_examples=60, deadline=None)
@given(
    start=st.tuples(*[st.integers(-4, 6)] * 3), size=st.tuples(*[st.integers(0, 6)] * 3), codec=st.sampled_from(CODECS)
)
def test_any_box_of_cells_of_a_map_equals_a_padded_slice(box_stores, codec, start, size):
    reader, _, volume_id = box_stores[codec]
    start_voxel, size_voxels = (tuple(8 * n for n in cells) for cells in (start, size))
    for name in ("valid", "body"):
        found = reader.read_map_region(volume_id, name, start_voxel, size_voxels)
        np.testing.assert_array_equal(found, padded(reader.read_map(volume_id, name), start, size, 0))


@pytest.fixture(scope="module")
def box_stores(tmp_path_factory):
    """Edges that are no multiples of the tile, one store a codec."""
    found = {}
    for codec in CODECS:
        store = make_store(tmp_path_factory.mktemp("boxes") / codec, [(40, 36, 33)], superpatch=16, codec=codec)
        volume = store.volumes()[0]
        found[codec] = SuperpatchReader(store), oracle(store, volume), volume.volume_id
    return found


@pytest.fixture(scope="module")
def box_store(box_stores):
    return box_stores["fast"]


def index_rows(store: Store) -> list[dict]:
    return pq.read_table(store.path / "index" / "superpatches.parquet").to_pylist()


def test_rows_of_the_index_are_read_into_a_batch(store):
    rows = index_rows(store)[::-3]
    out = np.full((len(rows), 8, 8, 8), 77, np.int16)
    reader = SuperpatchReader(store)
    assert reader.read_superpatches(rows, out) is out
    for row, found in zip(rows, out, strict=True):
        expected = reader.read_superpatch(row["volume_id"], (row["iz"], row["iy"], row["ix"]))
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="shorter"):
        reader.read_superpatches(rows, out[:-1])


def test_rows_of_an_index_older_than_the_store_are_refused(tmp_path):
    store = make_store(tmp_path / "s", [(16, 16, 16)], superpatch=8)
    rows, out = index_rows(store)[:1], np.empty((1, 8, 8, 8), np.int16)
    with pytest.raises(StoreError, match=rows[0]["volume_id"]):
        SuperpatchReader(store).read_superpatches([{**rows[0], "crc32c": 1}], out)
    shutil.rmtree(store.path / "volumes")
    with pytest.raises(StoreError, match="expected a file of the store"):
        SuperpatchReader(store).read_superpatches(rows, out)


def test_decoding_stays_on_the_calling_thread(store):
    blosc.use_threads = None
    SuperpatchReader(store)
    assert blosc.use_threads is False


def test_whole_tiles_are_read_in_place(box_store):
    reader, whole, volume_id = box_store
    batch = np.zeros((2, 16, 16, 16), np.int16)
    reader.read_region(volume_id, (16, 16, 16), (16, 16, 16), batch[1])
    np.testing.assert_array_equal(batch[1], whole[16:32, 16:32, 16:32])
    assert not batch[0].any()


@pytest.mark.parametrize("codec", CODECS)
def test_strided_buffers_get_the_right_voxels_or_an_error(tmp_path, codec):
    """A region may go anywhere; a superpatch is decoded in place and needs one piece of memory."""
    store = make_store(tmp_path / "s", [(16, 16, 16)], superpatch=16, codec=codec)
    volume, reader = store.volumes()[0], SuperpatchReader(store)
    strided = np.zeros((16, 16, 32), np.int16)[:, :, ::2]
    reader.read_region(volume.volume_id, (0, 0, 0), (16, 16, 16), strided)
    np.testing.assert_array_equal(strided, oracle(store, volume))
    with pytest.raises(ValueError, match="contiguous"):
        reader.read_superpatch(volume.volume_id, (0, 0, 0), np.zeros((16, 16, 32), np.int16)[:, :, ::2])
    with pytest.raises(ValueError, match="int16"):
        reader.read_superpatch(volume.volume_id, (0, 0, 0), np.zeros((16, 16, 16), np.uint16))
    with pytest.raises((ValueError, StoreError)):
        reader.read_superpatch(volume.volume_id, (0, 0, 0), np.zeros((8, 16, 16), np.int16))


@pytest.mark.parametrize("out", [np.zeros((4, 4, 5), np.int16), np.zeros((4, 4, 4), np.float32)])
def test_buffers_of_another_size_or_type_are_refused(box_store, out):
    reader, _, volume_id = box_store
    with pytest.raises(ValueError, match="int16 buffer"):
        reader.read_region(volume_id, (0, 0, 0), (4, 4, 4), out)


def test_maps_equal_zarr_and_regions_of_them_a_padded_slice(box_store):
    reader, _, volume_id = box_store
    volume = reader.volumes[volume_id]
    for name in ("valid", "body"):
        group = zarr.open_group(reader.storage.root / volume.prefix, mode="r")
        cells = group[name][...]
        np.testing.assert_array_equal(reader.read_map(volume_id, name), cells)
        assert cells.shape == (5, 5, 5) and cells.dtype == np.uint8
        for start in ((0, 0, 0), (-8, 16, 24), (40, 0, 0), (-80, 0, 0)):
            found = reader.read_map_region(volume_id, name, start, (16, 24, 32))
            expected = padded(cells, [s // 8 for s in start], (2, 3, 4), 0)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("start", "size"), [((4, 0, 0), (8, 8, 8)), ((0, 0, 0), (8, 8, 9)), ((-1, 0, 0), (8, 8, 8))])
def test_map_regions_need_whole_cells(box_store, start, size):
    reader, _, volume_id = box_store
    with pytest.raises(ValueError, match="multiples of 8"):
        reader.read_map_region(volume_id, "valid", start, size)


def test_unknown_map_is_refused(box_store):
    reader, _, volume_id = box_store
    with pytest.raises(ValueError, match="lungs"):
        reader.read_map(volume_id, "lungs")


@pytest.mark.parametrize("codec", slow_but(("fast", "compact"), ("fast",)))
def test_many_threads_share_a_reader(tmp_path, codec):
    store = make_store(tmp_path / "s", [(40, 40, 40), (33, 20, 40)], superpatch=16, codec=codec)
    reader = SuperpatchReader(store)
    expected = {v.volume_id: oracle(store, v) for v in store.volumes()}
    maps = {v.volume_id: SuperpatchReader(store).read_map(v.volume_id, "body") for v in store.volumes()}

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            volume_id = list(expected)[rng.integers(2)]
            start, size = rng.integers(-10, 30, 3), rng.integers(1, 30, 3)
            found = reader.read_region(volume_id, tuple(start.tolist()), tuple(size.tolist()))
            np.testing.assert_array_equal(found, padded(expected[volume_id], start, size, AIR_HU))
            np.testing.assert_array_equal(reader.read_map(volume_id, "body"), maps[volume_id])
        return True

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(read, range(16)))


def test_each_volume_is_an_ome_zarr_image(store):
    """OME-Zarr 0.6: named coordinate systems, and levels placed in them (z, y, x in mm)."""
    for volume in store.volumes():
        group = zarr.open_group(store.path / volume.prefix, mode="r")
        assert group.attrs["ome"]["version"] == "0.6"
        (image,) = group.attrs["ome"]["multiscales"]
        assert [system["name"] for system in image["coordinateSystems"]] == ["grid", "lps"]
        assert [axis["name"] for axis in image["coordinateSystems"][0]["axes"]] == ["z", "y", "x"]
        dataset = image["datasets"][0]
        (place,) = dataset["coordinateTransformations"]
        scale, translation = place["transformations"]
        assert (scale["type"], tuple(scale["scale"])) == ("scale", volume.spacing)
        assert (translation["type"], translation["translation"]) == ("translation", list(volume.affine[2::-1, 3]))
        array = group[dataset["path"]]
        assert array.metadata.dimension_names == ("z", "y", "x")
        assert (array.fill_value, array.chunks) == (AIR_HU, (8, 8, 8))
        levels = {level["path"] for level in image["datasets"]}
        assert set(dict(group.members())) - {"thumbnail"} == {"valid", "body"} | levels


def test_the_store_is_a_tree_of_zarr_groups(store):
    volume = store.volumes()[0]
    root = zarr.open_group(store.path, mode="r")
    array = root[f"{volume.prefix}/0"]
    assert array.shape == volume.shape
    node: zarr.Group = root
    for part in volume.prefix.split("/"):
        node = node[part]
        assert isinstance(node, zarr.Group)


def test_shards_hold_no_chunk_outside_the_volume(store):
    """Raw chunks would otherwise multiply the size of volumes that end inside a shard."""
    for volume in store.volumes():
        for path in {patch.path for patch in volume.superpatches}:
            stored = sum(patch.length for patch in volume.superpatches if patch.path == path)
            per_shard = min(64, np.prod(volume.grid)) if len(volume.superpatches) <= 64 else 64
            assert store.storage.size(path) == stored + 16 * per_shard + 4


def test_shares_of_superpatches_are_those_of_their_voxels(tmp_path):
    rng = np.random.default_rng(5)
    store = make_store(tmp_path / "s", [], superpatch=16)
    hu = rng.choice(np.array([-1000, 40], np.int16), (20, 33, 16))
    valid = np.zeros(hu.shape, bool)
    valid[2:, 5:30] = True
    hu[~valid] = AIR_HU
    body = valid & (hu > 0)
    volume = add_volume(store, hu, valid=valid, body=body)
    for patch in volume.superpatches:
        start = [16 * i for i in patch.index]
        inside, tissue = padded(valid, start, (16,) * 3, False), padded(body, start, (16,) * 3, False)
        air = padded(hu, start, (16,) * 3, AIR_HU) <= -900
        assert patch.valid == pytest.approx(inside.mean(), abs=2 / 255)
        assert patch.body == pytest.approx(tissue.mean(), abs=2 / 255)
        expected = (air & inside).sum() / inside.sum() if inside.any() else 0.0
        assert patch.air == pytest.approx(expected, abs=0.02 / max(inside.mean(), 0.05))
