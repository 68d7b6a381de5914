"""From a source to an attempt: rounding, clipping, statistics, hashes, and that bad writes are noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import zarr
from support import ct_encodings, ct_unlisted  # noqa: F401 (they add their cases)
from support.ct_cases import CASES
from support.ct_phantom import base_affine
from support.lanes import slow_but
from support.sources import NATIVE, edit_pixel, phantom_hu
from support.stores import add_volume, make_store, synthetic_hu

from maesil.errors import Refused, StoreError
from maesil.ingest.decode import read, source_hash
from maesil.ingest.plan import make_plan
from maesil.ingest.scan import scan
from maesil.ingest.source import Source
from maesil.ingest.volume import BuildOrder, build
from maesil.store.local_storage import LocalStorage
from maesil.store.nifti import write_nifti
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series
from maesil.types import AIR_HU


def source_in(folder: Path) -> Source:
    (item,) = make_plan(scan([folder])).volumes
    return item.source


@pytest.fixture
def series(tmp_path) -> Path:
    write_dicom_series(tmp_path / "in", phantom_hu(), base_affine(), SeriesIdentity(rescale=(0.37, -1024.0)), seed=1)
    return tmp_path / "in"


def built(tmp_path: Path, source: Source, recipe=NATIVE):
    store = Store.create(tmp_path / "s.zarr", recipe, "0" * 16)
    order = BuildOrder(store.path, recipe, "ab" * 16, "cd" * 16, source_hash(source), "ef" * 16)
    volume = store.commit(build(source, order))
    return volume, SuperpatchReader(store)


def test_hu_are_rounded_once(tmp_path, series):
    source = source_in(series)
    volume, reader = built(tmp_path, source)
    exact = read(source).hu
    stored = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    assert np.abs(stored - exact).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(stored, np.rint(exact))


def test_statistics_are_those_of_the_stored_valid_voxels(tmp_path):
    hu = phantom_hu()
    hu[:, :4] = -3000  # outside the field of view, not declared
    hu[12, 20, 10:14] = 5000  # metal
    write_nifti(tmp_path / "in" / "a.nii.gz", hu.astype(np.int16), base_affine())
    volume, reader = built(tmp_path, source_in(tmp_path / "in"))
    stored = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    inside = stored[:, 4:].astype(np.float64)
    assert (stored[:, :4] == AIR_HU).all()
    assert volume.hu["mean"] == pytest.approx(inside.mean())
    assert volume.hu["std"] == pytest.approx(inside.std())
    assert (volume.hu["min"], volume.hu["max"]) == (inside.min(), 3071)
    assert volume.hu["median"] == np.sort(inside.ravel())[(inside.size - 1) // 2]
    for name, percent in (("p01", 1), ("p99", 99)):
        assert abs(volume.hu[name] - np.percentile(inside, percent)) <= 2
    assert volume.hu["valid_share"] == pytest.approx(36 / 40)
    assert volume.hu["clipped_high_share"] == pytest.approx(4 / inside.size)
    assert volume.hu["clipped_low_share"] == 0
    assert 0.1 < volume.hu["body_share"] < 0.9


def test_the_hash_of_a_series_knows_pixels_not_names(tmp_path, series):
    before = source_hash(source_in(series))
    for number, path in enumerate(sorted(series.iterdir())):
        path.rename(path.with_name(f"renamed {number}"))
    assert source_hash(source_in(series)) == before
    edit_pixel(sorted(series.iterdir())[3])
    assert source_hash(source_in(series)) != before


def test_the_hash_of_a_nifti_knows_voxels_and_place_not_packing(tmp_path):
    import gzip

    hu = phantom_hu().astype(np.int16)
    write_nifti(tmp_path / "a" / "a.nii.gz", hu, base_affine())
    before = source_hash(source_in(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.nii").write_bytes(gzip.decompress((tmp_path / "a" / "a.nii.gz").read_bytes()))
    assert source_hash(source_in(tmp_path / "b")) == before
    write_nifti(tmp_path / "c" / "a.nii.gz", hu, base_affine(origin=(0, 0, 1)))
    hu[0, 0, 0] += 1
    write_nifti(tmp_path / "d" / "a.nii.gz", hu, base_affine())
    assert len({source_hash(source_in(tmp_path / name)) for name in "acd"}) == 3


def test_slices_of_another_size_are_refused(tmp_path, series):
    source = source_in(series)
    write_dicom_series(tmp_path / "other", phantom_hu()[:1, 1:, 1:], base_affine(), SeriesIdentity())
    shutil.copy(next((tmp_path / "other").iterdir()), source.paths[5])
    with pytest.raises(Refused, match="another size"):
        read(source)


def test_building_twice_gives_two_attempts_of_the_same_bytes(tmp_path, series):
    source = source_in(series)
    store = Store.create(tmp_path / "s.zarr", NATIVE, "0" * 16)
    order = BuildOrder(store.path, NATIVE, "ab" * 16, "cd" * 16, "hash", "ef" * 16)
    first, second = build(source, order), build(source, order)
    assert first.attempt != second.attempt
    strip = [(p.index, p.offset, p.length, p.crc32c, p.valid, p.body, p.air) for p in first.superpatches]
    assert strip == [(p.index, p.offset, p.length, p.crc32c, p.valid, p.body, p.air) for p in second.superpatches]
    assert store.volumes() == []  # nothing refers to them yet
    assert store.commit(second).attempt == second.attempt
    store.commit(first)
    assert not (store.path / first.prefix).exists()


def test_other_voxels_read_back_than_written_are_noticed(tmp_path, monkeypatch):
    """A disk or memory that alters one voxel between writing and committing."""
    store = make_store(tmp_path / "s", [], superpatch=16)
    real = LocalStorage.put_parts

    def altered(storage, key, parts):
        real(storage, key, parts)
        hu = zarr.open_array(storage.root / key.removesuffix("/c/0/0/0"), mode="r+")
        hu[3, 4, 5] = hu[3, 4, 5] + 1

    monkeypatch.setattr(LocalStorage, "put_parts", altered)
    with pytest.raises(StoreError, match="read back other voxels"):
        add_volume(store, synthetic_hu((20, 20, 20)))
    assert store.volumes() == []
    folders = [path for path in (store.path / "volumes").rglob("*") if path.is_dir()]
    assert len(folders) == 2  # the groups above: nothing of the attempt is left


@pytest.mark.parametrize(
    "name",
    slow_but(("enhanced", "enhanced_frames_shuffled", "enhanced_rescale_per_frame", "clean"), ("enhanced", "clean")),
)
def test_clean_series_are_read_as_highdicom_reads_them(tmp_path, name):
    """The same HU at the same places of the patient, whichever end of the stack comes first."""
    CASES[name].build(tmp_path, "PATIENT")
    ours, paths = read(source_in(tmp_path)), sorted(path for path in tmp_path.rglob("*") if path.is_file())
    if len(paths) == 1:
        theirs = highdicom.imread(paths[0]).get_volume(apply_presentation_lut=False)
    else:
        slices = [pydicom.dcmread(path) for path in paths]
        theirs = highdicom.get_volume_from_series(slices, apply_presentation_lut=False)
    to_theirs = np.linalg.inv(theirs.affine) @ ours.affine
    corners = np.array([[z, y, x, 1] for z in (0, ours.shape[0] - 1) for y in (0, 5) for x in (0, 7)])
    places = np.rint((corners @ to_theirs.T)[:, :3]).astype(int)
    np.testing.assert_allclose((corners @ to_theirs.T)[:, :3], places, atol=1e-3)
    flipped = places[0, 0] != 0
    array = theirs.array[::-1] if flipped else theirs.array
    assert array.shape == ours.shape
    np.testing.assert_allclose(ours.hu[ours.valid], array[ours.valid], atol=0.01)
    assert ours.valid.mean() > 0.5
