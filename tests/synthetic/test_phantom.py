"""The chest phantom as a function of position, and the DICOM writer and noise around it."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from support.ct_phantom import rotated

from maesil.synthetic.dicom import SeriesIdentity, add_noise, grid_affine, write_dicom_series
from maesil.synthetic.phantom import ORGANS, ChestPhantom, sample_on_grid

COARSE = (10.0, 5.0, 5.0)


def coarse_scan(seed: int = 0) -> np.ndarray:
    return sample_on_grid(ChestPhantom(seed).hu, (24, 56, 72), grid_affine(COARSE, (-177.5, -137.5, 10.0)))


def hu_at(x: float, y: float, z: float, seed: int = 0) -> float:
    return float(ChestPhantom(seed).hu(np.array([[x, y, z]]))[0])


def test_tissues_are_where_anatomy_has_them() -> None:
    phantom = ChestPhantom(0)
    z = float(phantom.carina[2])
    assert hu_at(0, -170, z) == -1000  # in front of the patient
    assert hu_at(0, phantom.half_depth + 5, z) == -1000  # the gap above the couch
    assert -990 < hu_at(0, phantom.half_depth + 18, z) < -880  # the couch's foam
    assert hu_at(*np.add(phantom.carina, (0, -2, 40))) < -950  # the trachea
    assert -930 < hu_at(-95, 0, z - 20) < -600 and -930 < hu_at(95, 0, z - 20) < -600  # lungs
    assert 60 < hu_at(-70, -10, phantom.base) < 150  # liver, on the right (x < 0)
    assert hu_at(24, phantom.spine_y - 6, z - 20) > 150  # aorta, left of the spine
    assert hu_at(0, phantom.spine_y + 4, z) > 60  # spine


@pytest.mark.parametrize("seed", [0, 3])
def test_organs_are_numbered_where_their_tissue_is(seed: int) -> None:
    grid = grid_affine((8.0, 5.0, 5.0), (-177.5, -137.5, -60.0))
    hu, organs = (sample_on_grid(f, (40, 56, 72), grid) for f in (ChestPhantom(seed).hu, ChestPhantom(seed).organs))
    assert set(np.unique(organs)) == set(range(len(ORGANS) + 1))
    expected = {"lung": (-1000, -300), "heart": (-70, 320), "liver": (40, 200), "kidney": (-60, 200)}
    for number, organ in enumerate(ORGANS, start=1):
        low, high = np.percentile(hu[organs == number], [10, 90])
        assert expected[organ][0] < low <= high < expected[organ][1], organ
    # Nearly all that has the HU of lung tissue is in a lung; the rest is couch, and ramps from skin or airway to air.
    tissue = (hu > -880) & (hu < -820)
    assert (tissue & (organs == 1)).sum() > 0.85 * tissue.sum()


def test_a_scan_holds_every_class_of_tissue() -> None:
    hu = coarse_scan()
    body = hu[:, 8:-12, 12:-12]
    for low, high, least in ((-950, -500, 0.1), (-150, -50, 0.03), (0, 150, 0.2), (250, 1500, 0.02)):
        assert ((body >= low) & (body <= high)).mean() > least
    assert hu.min() >= -1000 and 500 < hu.max() < 1500
    assert (hu[:, 0] == -1000).all() and (hu[:, :, 0] <= -250).all()  # nothing but couch at the sides


def test_patients_differ_and_repeat() -> None:
    first, again, other = coarse_scan(1), coarse_scan(1), coarse_scan(2)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).mean() > 30


def test_hu_is_a_function_of_position_alone() -> None:
    """Any grid, block size or order of points gives the same HU at the same place."""
    phantom = ChestPhantom(3)
    points = np.random.default_rng(0).uniform([-150, -90, 0], [150, 90, 250], (10_000, 3)).astype(np.float32)
    together = phantom.hu(points)
    order = np.random.default_rng(1).permutation(len(points))
    np.testing.assert_allclose(phantom.hu(points[order]), together[order], atol=0.05)
    np.testing.assert_allclose(phantom.hu(points[:50]), together[:50], atol=0.05)
    assert phantom.hu(points.reshape(100, 100, 3)).shape == (100, 100)


def test_sampling_follows_an_oblique_affine() -> None:
    affine = rotated(grid_affine(COARSE, (-100.0, -80.0, 60.0)), (20.0, 10.0, -5.0))
    phantom = ChestPhantom(0)
    volume = sample_on_grid(phantom.hu, (6, 9, 11), affine)
    index = np.array([4, 7, 2, 1])
    np.testing.assert_allclose(volume[4, 7, 2], phantom.hu((affine @ index)[None, :3])[0], atol=0.05)


def test_borders_are_smooth_at_voxel_scale() -> None:
    line = np.stack([np.linspace(-180, 180, 7200), np.zeros(7200), np.full(7200, 150.0)], axis=1)
    assert np.abs(np.diff(ChestPhantom(0).hu(line))).max() < 60  # 0.05 mm apart


def test_noise_has_its_sigma_and_is_correlated_in_the_plane() -> None:
    noise = add_noise(np.full((12, 96, 90), 40.0), 15.0, np.random.default_rng(0)) - 40.0
    assert noise.std() == pytest.approx(15.0, rel=0.05)
    assert abs(noise.mean()) < 1.0

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * b).mean() / noise.var())

    assert correlation(noise[:, :, 1:], noise[:, :, :-1]) > 0.2
    assert 0.2 < correlation(noise[1:], noise[:-1]) < 0.6


def test_dicom_files_say_what_was_written(tmp_path) -> None:
    affine = rotated(grid_affine((2.5, 1.1, 0.9), (-10.5, 3.25, -40.0)), (3.0, -4.0, 5.0))
    hu = np.random.default_rng(0).integers(-1024, 1500, (5, 7, 9)).astype(np.float32)
    paths = write_dicom_series(tmp_path, hu, affine, SeriesIdentity(rescale=(0.5, -1024.0)), seed=4)
    assert len(set(paths)) == 5 and paths != sorted(paths)
    slices = [pydicom.dcmread(path) for path in paths]
    assert len({data.SeriesInstanceUID for data in slices}) == 1
    assert len({data.SOPInstanceUID for data in slices}) == 5
    for k, data in enumerate(slices):
        read = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
        np.testing.assert_array_equal(read, hu[k])
        row, column = np.array(data.ImageOrientationPatient, float).reshape(2, 3)
        corner = np.array(data.ImagePositionPatient, float)
        corner += row * data.PixelSpacing[1] * 8 + column * data.PixelSpacing[0] * 6
        np.testing.assert_allclose(corner, (affine @ [k, 6, 8, 1])[:3], atol=1e-6)
        assert data.file_meta.MediaStorageSOPInstanceUID == data.SOPInstanceUID


def test_the_same_identity_writes_the_same_files(tmp_path) -> None:
    hu, affine = np.zeros((3, 4, 5)), grid_affine((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    first, second = (write_dicom_series(tmp_path / name, hu, affine, seed=1) for name in "ab")
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_values_that_do_not_fit_16_bits_are_refused(tmp_path) -> None:
    identity = SeriesIdentity(rescale=(0.01, 0.0))
    with pytest.raises(ValueError, match="16 bits"):
        write_dicom_series(tmp_path, np.full((1, 2, 2), 2000.0), np.eye(4), identity)
