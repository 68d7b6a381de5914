"""Exported NIfTI against nibabel and SimpleITK: every voxel where the commit says it lies."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from support.stores import make_store

from maesil.errors import UsageError
from maesil.geometry import world_of
from maesil.store.nifti import export_volume, write_nifti
from maesil.store.reader import SuperpatchReader


def random_affine(seed: int, shear: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = (directions + shear * rng.uniform(-1, 1, (3, 3))) * rng.uniform(0.5, 5, 3)
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return affine


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("reader", ["nibabel", "SimpleITK"])
def test_values_and_positions(tmp_path, seed, reader):
    affine = random_affine(seed)
    hu = np.random.default_rng(seed).integers(-1024, 3072, (5, 6, 7)).astype(np.int16)
    path = tmp_path / "v.nii.gz"
    write_nifti(path, hu, affine)
    index = np.random.default_rng(seed + 1).integers(0, hu.shape, (10, 3))
    if reader == "nibabel":
        image = nib.load(path)
        data = np.asarray(image.dataobj).transpose(2, 1, 0)
        world = nib.affines.apply_affine(image.affine, index[:, ::-1]) * [-1, -1, 1]
    else:
        picture = sitk.ReadImage(str(path))
        data = sitk.GetArrayFromImage(picture)
        world = [picture.TransformIndexToPhysicalPoint([int(i) for i in row[::-1]]) for row in index]
    np.testing.assert_array_equal(data, hu)
    np.testing.assert_allclose(world, world_of(affine, index), atol=2e-3)


def test_both_forms_agree_and_speak_of_scanner_space(tmp_path):
    write_nifti(tmp_path / "v.nii.gz", np.zeros((4, 5, 6), np.int16), random_affine(3))
    image = nib.load(tmp_path / "v.nii.gz")
    (sform, s_code), (qform, q_code) = image.get_sform(coded=True), image.get_qform(coded=True)
    assert (s_code, q_code) == (1, 1)
    np.testing.assert_allclose(sform, qform, atol=1e-3)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.get_data_dtype() == np.int16
    slope, intercept = image.header.get_slope_inter()
    assert slope in (None, 1.0) and intercept in (None, 0.0)


def test_a_shear_is_left_to_the_sform(tmp_path):
    affine = random_affine(4, shear=0.1)
    write_nifti(tmp_path / "v.nii.gz", np.zeros((4, 5, 6), np.int16), affine)
    image = nib.load(tmp_path / "v.nii.gz")
    assert image.get_qform(coded=True)[1] == 0
    world = nib.affines.apply_affine(image.affine, [3, 2, 1]) * [-1, -1, 1]
    np.testing.assert_allclose(world, world_of(affine, [1, 2, 3]), atol=1e-3)


def test_a_volume_of_a_store(tmp_path):
    store = make_store(tmp_path / "s", [(20, 33, 17)], superpatch=16)
    volume, reader = store.volumes()[0], SuperpatchReader(store)
    path = export_volume(reader, volume.volume_id, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / f"{volume.volume_id}.nii.gz"
    image = nib.load(path)
    np.testing.assert_array_equal(
        np.asarray(image.dataobj).transpose(2, 1, 0), reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    )
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_export_into_a_file_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="expected a folder"):
        write_nifti(tmp_path / "file" / "v.nii.gz", np.zeros((4, 5, 6), np.int16), np.eye(4))


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(image, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError):
        write_nifti(tmp_path / "v.nii.gz", np.zeros((4, 5, 6), np.int16), np.eye(4))
    assert list(tmp_path.iterdir()) == []


def test_export_of_a_damaged_volume_writes_no_file(tmp_path):
    from maesil.errors import StoreError

    store = make_store(tmp_path / "s", [(20, 33, 17)], superpatch=16)
    volume = store.volumes()[0]
    (store.path / volume.superpatches[0].path).write_bytes(b"")
    with pytest.raises(StoreError):
        export_volume(SuperpatchReader(store), volume.volume_id, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_identity_affine_is_written(tmp_path):
    """An affine that equals nibabel's default must be stated all the same."""
    write_nifti(tmp_path / "v.nii.gz", np.zeros((4, 5, 6), np.int16), np.eye(4))
    assert nib.load(tmp_path / "v.nii.gz").get_sform(coded=True)[1] == 1
