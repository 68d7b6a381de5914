"""What is sent of a store against the store itself: the same voxels, each where it lies in the patient."""

from __future__ import annotations

import gzip
import io

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.stores import add_volume, make_store, synthetic_hu
from support.viewer_phantom import labelled

from maesil.errors import StoreError
from maesil.geometry import world_of
from maesil.store.nifti import export_volume
from maesil.store.reader import MAPS, SuperpatchReader
from maesil.viewer.answers import answer
from maesil.viewer.served_store import ServedStore, step_for


def read(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [z, y, x] and the affine (RAS, i j k)."""
    image = nib.Nifti1Image.from_bytes(data)
    return np.asarray(image.dataobj).transpose(2, 1, 0), image.affine


def lps(affine: np.ndarray, index_zyx: np.ndarray) -> np.ndarray:
    return nib.affines.apply_affine(affine, np.asarray(index_zyx)[..., ::-1]) * [-1, -1, 1]


@pytest.mark.parametrize("name", ["turned", "straight"])
def test_the_bytes_are_those_of_the_export(store, ids, tmp_path, name):
    exported = export_volume(SuperpatchReader(store), ids[name], tmp_path)
    assert ServedStore(store).ct(ids[name], (1, 1, 1)) == gzip.decompress(exported.read_bytes())


@pytest.mark.parametrize("step", [(1, 1, 2), (2, 2, 2), (3, 1, 5), (7, 40, 64)])
def test_voxels_left_out_move_none_of_the_others(store, ids, step):
    whole, affine = read(ServedStore(store).ct(ids["turned"], (1, 1, 1)))
    kept, coarse = read(ServedStore(store).ct(ids["turned"], step))
    np.testing.assert_array_equal(kept, whole[tuple(slice(None, None, every) for every in step)])
    index = np.stack(np.unravel_index(np.arange(kept.size), kept.shape), axis=-1)
    np.testing.assert_allclose(lps(coarse, index), lps(affine, index * step), atol=1e-3)


@pytest.mark.parametrize("name", MAPS)
def test_each_cell_of_a_map_lies_over_its_voxels(store, ids, name):
    cells, affine = read(ServedStore(store).overlay(ids["turned"], name))
    volume = store.volume(ids["turned"])
    np.testing.assert_array_equal(cells, SuperpatchReader(store).read_map(ids["turned"], name))
    corners = np.array([(0, 0, 0), (7, 7, 7)])
    for cell in [(0, 0, 0), (3, 2, 5), tuple(n - 1 for n in cells.shape)]:
        middle = world_of(volume.affine, corners + 8 * np.array(cell)).mean(axis=0)
        np.testing.assert_allclose(lps(affine, np.array(cell)), middle, atol=1e-3)


@given(
    shape=st.tuples(*[st.integers(1, 3000)] * 3),
    spacing=st.tuples(*[st.floats(0.1, 8)] * 3),
    most=st.integers(10**5, 10**8),
)
def test_steps_leave_few_enough_and_no_more_out_than_that(shape, spacing, most):
    from types import SimpleNamespace

    step = step_for(SimpleNamespace(shape=shape, spacing=spacing), most)

    def left(steps):
        return int(np.prod([-(-n // every) for n, every in zip(shape, steps, strict=True)], dtype=np.int64))

    assert left(step) <= most
    if step != (1, 1, 1):
        assert any(left((*step[:a], step[a] - 1, *step[a + 1 :])) > most for a in range(3) if step[a] > 1)


def test_the_picture_shows_the_head_above_and_the_left_at_the_right(tmp_path):
    store = make_store(tmp_path / "s", [], superpatch=32)
    hu = np.full((40, 24, 60), -1000, np.int16)
    hu[28:36, :, 40:56] = 1000  # towards the head, on the left
    volume = add_volume(store, hu, spacing=(3.0, 2.0, 2.0))
    picture = np.asarray(Image.open(io.BytesIO(ServedStore(store).picture(volume.volume_id))))
    assert picture.shape == (220, 220)  # 120 mm in both
    rows, columns = np.nonzero(picture > 200)
    np.testing.assert_allclose([rows.min(), rows.max()], [220 * 4 / 40, 220 * 12 / 40], atol=3)
    np.testing.assert_allclose([columns.min(), columns.max()], [220 * 40 / 60, 220 * 56 / 60], atol=3)


def test_words_find_volumes_by_id_note_and_technical_value(tmp_path):
    store = make_store(tmp_path / "s", [(8, 8, 8)], superpatch=16)
    one = add_volume(store, synthetic_hu((8, 8, 8)), name="one", notes=("sheared",), source={"Manufacturer": "ACME X1"})
    scans = ServedStore(store)
    assert len(scans.found("")) == 2
    for words in (one.volume_id[:9].upper(), "SHEARED", "acme", "x1 sheared", one.group[:10]):
        assert scans.found(words) == [one], words
    assert scans.found("acme gap") == []


def test_volumes_that_come_later_are_found_after_a_refresh(tmp_path):
    store = make_store(tmp_path / "s", [(8, 8, 8)], superpatch=16)
    scans = ServedStore(store)
    late = add_volume(store, synthetic_hu((8, 8, 8)), name="late")
    assert late.volume_id not in scans.volumes
    scans.refresh()
    assert late.volume_id in scans.volumes


@pytest.mark.parametrize("step", [(1, 1, 1), (2, 1, 3)])
def test_labels_lie_on_their_volume_and_have_names_and_colours(tmp_path, step):
    store, volume, labels = labelled(tmp_path)
    scans = ServedStore(store)
    assert scans.labels(volume.volume_id) == ["organs"]
    kept, affine = read(scans.label_voxels(volume.volume_id, "organs", step))
    np.testing.assert_array_equal(kept, labels[tuple(slice(None, None, every) for every in step)])
    np.testing.assert_allclose(affine, read(scans.ct(volume.volume_id, step))[1], atol=1e-6)
    image = scans.label_image(volume.volume_id, "organs")
    assert image.classes == {1: "<liver>", 2: "lesion", 255: "not labelled"}
    assert image.colours[1][3] == image.colours[2][3] == 255 and image.colours[255][3] == 0
    assert image.colours[1] != image.colours[2]
    address = f"/volumes/{volume.volume_id}/labels/organs"
    assert answer(scans, "/t", address, "whole").body == scans.label_voxels(volume.volume_id, "organs", (1, 1, 1))
    assert answer(scans, "/t", f"{address}x", "").status == 404
    page = answer(scans, "/t", f"/volumes/{volume.volume_id}", "").body.decode()
    assert f"/t{address}?whole" in page and "<liver>" not in page and "\\u003cliver\\u003e" in page


def test_labels_that_were_changed_are_not_shown(tmp_path):
    store, volume, _ = labelled(tmp_path)
    shard = next(key for key in volume.documents if key.startswith("labels/organs/0/c"))
    path = store.path / volume.prefix / shard
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="labels 'organs': damaged"):
        ServedStore(store).label_voxels(volume.volume_id, "organs", (1, 1, 1))
    path.unlink()
    with pytest.raises(StoreError, match="expected a file of the store"):
        ServedStore(store).label_voxels(volume.volume_id, "organs", (1, 1, 1))
