"""Segmentations beside the voxels: label images that others read, on the volume's grid, that nothing can corrupt."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from ngff_zarr.validate import validate
from support.ct_phantom import base_affine, rotated
from support.ome_reader import OmeImage
from support.stores import add_volume, synthetic_hu
from typer.testing import CliRunner

from maesil.cli import app
from maesil.errors import UsageError
from maesil.store.export import export_ome_zarr
from maesil.store.garbage import find_garbage, remove_garbage
from maesil.store.index import index_is_current
from maesil.store.labels import add_label_image, label_names
from maesil.store.nifti import write_nifti
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.verify import verify

AFFINE = rotated(base_affine(), (9.0, -7.0, 12.0))
SHAPE = (30, 66, 70)


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "s", Recipe(spacing=None, superpatch=16), key_fingerprint="0" * 16)
    add_volume(store, synthetic_hu(SHAPE), affine=AFFINE)
    return store


def organs() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:20, 10:40, 12:60] = 1
    labels[8:12, 20:30, 20:31] = 7
    return labels


def add(store: Store, folder: Path, labels: np.ndarray, affine: np.ndarray = AFFINE, *arguments: str):
    (volume,) = store.volumes()
    write_nifti(folder / f"{volume.volume_id}.nii.gz", labels.astype(np.int16), affine)
    (folder / "classes.json").write_text(json.dumps({"1": "liver", "7": "cyst"}))
    return CliRunner().invoke(app, ["store", "add-labels", str(store.path), str(folder), *arguments])


def test_labels_are_a_label_image_on_the_grid_of_the_volume(store, tmp_path):
    (before,) = store.volumes()
    result = add(store, tmp_path / "labels", organs(), AFFINE, "--name", "organs")
    assert result.exit_code == 0, result.output
    (volume,) = store.volumes()
    assert label_names(volume) == ["organs"] and volume.generation == before.generation + 1
    group = zarr.open_group(store.path / volume.prefix / "labels", mode="r")
    assert group.attrs["ome"] == {"version": "0.6", "labels": ["organs"]}
    told = group["organs"].attrs.asdict()
    validate(told, version="0.6", model="label")
    named = {entry["label-value"]: entry["class"] for entry in told["ome"]["image-label"]["properties"]}
    assert named == {1: "liver", 2: "cyst", 255: "not labelled"}
    assert told["ome"]["image-label"]["source"] == {"image": "../../"}
    image, scan = OmeImage(store.path / volume.prefix / "labels/organs"), OmeImage(store.path / volume.prefix)
    np.testing.assert_array_equal(image.hu(), np.select([organs() == 7, organs() == 1], [2, 1]))
    assert len(image.read.images) == len(scan.read.images) > 1
    for level in range(len(image.read.images)):
        assert image.hu(level).shape == scan.hu(level).shape
        np.testing.assert_allclose(image.corners(level), scan.corners(level), rtol=0, atol=1e-6)
    assert set(np.unique(image.hu(1))) == {0, 1, 2}
    assert verify(store).problems == () and index_is_current(store)


def test_labels_of_another_grid_are_placed_by_their_affine(store, tmp_path):
    """Twice as fine, and turned over: the same organs, but for the rounding at their edges."""
    fine = organs()[::-1].repeat(2, 0).repeat(2, 1).repeat(2, 2)
    affine = AFFINE.copy()
    affine[:3, 0] *= -1
    affine[:3, :3] /= 2
    affine[:3, 3] = (AFFINE @ [SHAPE[0] - 0.75, -0.25, -0.25, 1])[:3]
    assert add(store, tmp_path / "labels", fine, affine).exit_code == 0
    (volume,) = store.volumes()
    found = OmeImage(store.path / volume.prefix / "labels/segmentation").hu()
    np.testing.assert_array_equal(found > 0, organs() > 0)


def test_the_same_name_replaces_and_another_stays(store, tmp_path):
    for name, labels in (("one", organs()), ("two", organs()), ("one", np.minimum(organs(), 1))):
        assert add(store, tmp_path / "labels", labels, AFFINE, "--name", name).exit_code == 0
    (volume,) = store.volumes()
    assert label_names(volume) == ["one", "two"]
    assert [OmeImage(store.path / volume.prefix / f"labels/{name}").hu().max() for name in ("one", "two")] == [1, 2]
    for garbage in find_garbage(store, older_than_hours=-1):
        remove_garbage(store, garbage)
    assert verify(store).problems == ()


def test_labels_go_with_an_export(store, tmp_path):
    add(store, tmp_path / "labels", organs())
    (volume,) = store.volumes()
    path = export_ome_zarr(SuperpatchReader(store), volume.volume_id, tmp_path / "out")
    assert OmeImage(path / "labels/segmentation").hu().max() == 2


def test_damage_of_labels_is_found(store, tmp_path):
    add(store, tmp_path / "labels", organs())
    (volume,) = store.volumes()
    for name in ("labels/zarr.json", "labels/segmentation/zarr.json", "labels/segmentation/0/c/0/0/0"):
        path = store.path / volume.prefix / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        (problem,) = verify(store).problems
        assert name in problem
        path.write_bytes(data)


def test_labels_of_another_scan_are_refused_in_one_line(store, tmp_path):
    away = AFFINE.copy()
    away[:3, 3] += 500
    result = add(store, tmp_path / "labels", organs(), away)
    assert result.exit_code == 2 and "of another scan" in result.output
    (volume,) = store.volumes()
    assert label_names(volume) == [] and volume.generation == 1


def test_what_is_no_label_image_is_refused(store):
    (volume,) = store.volumes()
    with pytest.raises(UsageError, match="shape"):
        add_label_image(store, volume, "organs", np.zeros((3, 3, 3), np.uint8), ["liver"], 255)
    with pytest.raises(UsageError, match="--name"):
        add_label_image(store, volume, "../0", organs(), ["liver"], 255)
    assert store.volumes() == [volume]


def test_a_volume_of_version_1_is_upgraded_first(tmp_path):
    with tarfile.open(Path(__file__).parents[1] / "archive" / "store-1.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    store = Store.open(tmp_path / "raw.zarr")
    volume = store.volumes()[0]
    with pytest.raises(UsageError, match="store upgrade"):
        add_label_image(store, volume, "organs", np.zeros(volume.shape, np.uint8), ["liver"], 255)
    assert Store.open(store.path).version == 1
