"""Real CT: the store holds, voxel by voxel and at the same place, what other readers find in the files.

The folder comes from `MAESIL_TEST_DATA`; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from support.ct_phantom import valid_voxels
from support.lanes import slow_but

from maesil.ingest.plain_file import read_plain
from maesil.ingest.run import IngestOptions, ingest
from maesil.ingest.values import tags_of
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.store import Store

DATA = Path(os.environ.get("MAESIL_TEST_DATA", "no such folder"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="MAESIL_TEST_DATA names no folder")

NIFTI = sorted(path.name for path in (DATA / "nifti").glob("*.nii.gz"))
DICOM = sorted(path.name for path in (DATA / "dicom").glob("*") if path.is_dir())
EDGE_DICOM = sorted(path.name for path in (DATA / "edge_dicom").glob("*") if path.is_dir())
EDGE_NIFTI = sorted(path.name for path in (DATA / "edge_nifti").glob("*.nii*"))
SMALL = ("totseg_example_ct.nii.gz", "totseg_example_j2k")
SWAP = np.array([[-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), [2, 1, 0, 3]


def ingest_native(sources: list[Path], root: Path, out: Path, workers: int = 0):
    options = IngestOptions(workers=workers, key_file=root / "key", cache_folder=root / "cache")
    return ingest(sources, out, Recipe(spacing=None, superpatch=128), options)


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """HU [z, y, x] and the affine to LPS, by nibabel alone."""
    image = nib.load(path)
    data = np.asarray(image.dataobj, np.float64)
    turn, order = SWAP
    return data.reshape(data.shape[:3]).transpose(2, 1, 0), (turn @ image.affine)[:, order]


def read_dicom(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """HU [z, y, x] and the affine to LPS of one clean axial series, by pydicom alone."""
    slices = [pydicom.dcmread(path) for path in sorted(folder.iterdir()) if path.suffix != ".json"]
    slices.sort(key=lambda data: float(data.ImagePositionPatient[2]))
    slope, intercept = float(slices[0].RescaleSlope), float(slices[0].RescaleIntercept)
    hu = np.stack([data.pixel_array.astype(np.float64) * slope + intercept for data in slices])
    affine = np.eye(4)
    row, column = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    affine[:3, 0] = (position_of(slices[-1]) - position_of(slices[0])) / (len(slices) - 1)
    affine[:3, 1] = column * float(slices[0].PixelSpacing[0])
    affine[:3, 2] = row * float(slices[0].PixelSpacing[1])
    affine[:3, 3] = position_of(slices[0])
    return hu, affine


def position_of(data: pydicom.Dataset) -> np.ndarray:
    return np.array(data.ImagePositionPatient, float)


def on_the_grid_of(volume, hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turn and flip a source onto the stored grid; fails unless both are the same points of the patient."""
    to_stored = np.linalg.inv(volume.affine) @ affine
    turn = np.rint(to_stored[:3, :3]).astype(int)
    np.testing.assert_allclose(to_stored[:3, :3], turn, atol=1e-3)
    assert (np.abs(turn).sum(axis=0) == 1).all()
    order = np.abs(turn).argmax(axis=1)
    turned = hu.transpose(order)
    turned = turned[tuple(slice(None, None, int(turn[k, order[k]])) for k in range(3))]
    assert turned.shape == volume.shape
    corner = np.where(turn.sum(axis=0) > 0, 0, np.array(hu.shape) - 1)  # the source's index of the first voxel
    first = to_stored[:3, :3] @ corner + to_stored[:3, 3]
    np.testing.assert_allclose(first, 0, atol=0.02)  # in voxels
    return turned


class Real:
    """A store of real scans at native spacing."""

    def __init__(self, root: Path, sources: list[Path], workers: int = 0) -> None:
        self.summary = ingest_native(sources, root, root / "store.zarr", workers)
        self.store = Store.open(root / "store.zarr")
        self.reader = SuperpatchReader(self.store)

    def volume_of(self, path: Path):
        ids = {v.volume_id for v in self.summary.files if v.path.is_relative_to(path) and v.status == "used"}
        (volume_id,) = ids
        return next(volume for volume in self.store.volumes() if volume.volume_id == volume_id)


def source_of(name: str) -> Path:
    return DATA / ("dicom" if name in DICOM else "nifti") / name


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Real:
    """All real scans, by two workers."""
    return Real(tmp_path_factory.mktemp("real"), [DATA / "dicom", DATA / "nifti"], workers=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Real:
    """The smallest of either kind."""
    return Real(tmp_path_factory.mktemp("small"), [source_of(name) for name in SMALL])


@pytest.mark.slow
def test_ten_volumes_are_committed(real: Real) -> None:
    assert len(real.store.volumes()) == len(NIFTI) + len(DICOM) == 10
    assert real.summary.counts["quarantined"] == 0


@pytest.mark.parametrize("name", SMALL)
def test_stored_hu_of_a_small_scan_equal_the_source(small: Real, name: str) -> None:
    assert len(small.store.volumes()) == 2
    stored_hu_equal_the_source(small, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NIFTI + DICOM)
def test_stored_hu_equal_the_source(real: Real, name: str) -> None:
    stored_hu_equal_the_source(real, name)


def stored_hu_equal_the_source(real: Real, name: str) -> None:
    is_dicom, source = name in DICOM, source_of(name)
    volume = real.volume_of(source)
    expected = on_the_grid_of(volume, *(read_dicom(source) if is_dicom else read_nifti(source)))
    stored = real.reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    valid = valid_voxels(real.reader, volume)
    expected = np.clip(np.rint(expected), -1024, 3071)
    differs = np.abs(stored - expected)
    assert differs[valid].max() == 0
    # Outside the valid cells only padding may differ: far below air in the source, air in the store.
    assert (stored[(differs > 0)] == -1024).all()


def _edge(root: Path, source: Path):
    """One edge case in a store of its own: the cases share their UIDs."""
    summary = ingest_native([source], root, root / "store.zarr")
    return summary, Store.open(root / "store.zarr")


@pytest.mark.parametrize("name", slow_but(EDGE_DICOM, EDGE_DICOM[::3]))
def test_edge_dicom(tmp_path, name: str) -> None:
    summary, store = _edge(tmp_path, DATA / "edge_dicom" / name)
    expected = json.loads((DATA / "edge_dicom" / name / "EXPECT.json").read_text())
    volumes = store.volumes()
    if expected["outcome"] == "detect_gap":
        assert not volumes
        assert {v.code for v in summary.files if v.status == "quarantined"} == {"gap"}
        return
    if expected["outcome"] == "two_volumes_or_reject":
        assert len(volumes) in (0, 2)
        assert all(volume.shape[0] == 20 for volume in volumes)
        return
    (volume,) = volumes
    assert list(volume.shape) == expected["shape_zyx"]
    np.testing.assert_allclose(volume.spacing, expected["spacing_zyx"], atol=1e-4)
    reader = SuperpatchReader(store)
    stored = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    reference = np.clip(np.load(DATA / "edge_dicom" / "reference_hu_zyx.npy"), -1024, 3071)
    if "padding" in name:
        inside = valid_voxels(reader, volume)
        assert 0.3 < inside.mean() < 1
        assert (stored[0, :8, :8] == -1024).all() and not inside[0, 0, 0]
        np.testing.assert_array_equal(stored[inside], reference[inside])
        assert (stored[stored != reference] == -1024).all()
    else:
        np.testing.assert_array_equal(stored, reference)


@pytest.mark.parametrize("name", slow_but(EDGE_NIFTI, EDGE_NIFTI[::3]))
def test_edge_nifti(tmp_path, name: str) -> None:
    """What each file is says EXPECT.json in words."""
    summary, store = _edge(tmp_path, DATA / "edge_nifti" / name)
    (verdict,) = summary.files
    if name in ("22_truncated.nii.gz", "23_not_gzip.nii.gz"):
        assert not store.volumes() and verdict.status == "quarantined"
        return
    (volume,) = store.volumes()
    reader = SuperpatchReader(store)
    stored = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    reference = on_the_grid_of(volume, *read_nifti(DATA / "edge_nifti" / "01_base_int16.nii.gz"))
    reference = np.clip(reference, -1024, 3071)
    inside = valid_voxels(reader, volume)
    np.testing.assert_array_equal(stored[inside], reference[inside])
    assert inside.mean() > 0.5
    if name == "13_nan_border.nii.gz":
        lost = ~np.isfinite(on_the_grid_of(volume, *read_nifti(DATA / "edge_nifti" / name)))
        assert lost.any() and (stored[lost] == -1024).all() and not inside[lost].any()
        np.testing.assert_array_equal(stored[~lost], reference[~lost])


def test_headers_read_by_us_are_those_that_pydicom_reads():
    tags = [tag for tag, _ in tags_of("PatientID", "SeriesInstanceUID", "ImagePositionPatient", "Rows", "KVP").values()]
    read = 0
    for path in sorted(path for folder in ("dicom", "edge_dicom") for path in (DATA / folder).rglob("*"))[::7]:
        if path.is_file() and path.suffix not in (".json", ".npy"):
            with path.open("rb") as stream:
                ours = read_plain(stream, tags)
            if ours is not None:
                assert ours == pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
                read += 1
    assert read > 20
