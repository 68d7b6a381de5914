"""From DICOM to OME-Zarr: where an independent reader of the store puts voxels, against DICOM's own answer."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from support.ct_cases import series
from support.ct_phantom import analytic_hu, base_affine, rotated, valid_voxels
from support.ome_reader import OmeImage, in_order

from maesil.ingest.options import IngestOptions
from maesil.ingest.run import ingest
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.verify import verify
from maesil.synthetic.dicom import save_all

NEAR_MM = 0.01


def _feet_first():
    affine = base_affine()
    affine[:3, 3] += affine[:3, :3] @ [23, 39, 47]
    affine[:3, :3] *= -1.0
    return {"affine": affine, "extra": {"PatientPosition": "FFP"}}


def _tilted():
    affine, turned = base_affine(), rotated(base_affine(), (15.0, 0.0, 0.0))
    affine[:3, 1:3] = turned[:3, 1:3]
    affine[:3, 3] = turned[:3, 3] + (0.0, 7.5, 1.0)
    return {"affine": affine, "extra": {"GantryDetectorTilt": "15"}}


SCANS = {
    "straight": {},
    "oblique": {"affine": rotated(base_affine(), (9.0, -7.0, 12.0))},
    "steep": {"affine": rotated(base_affine(), (38.0, 5.0, -20.0))},
    "feet first": _feet_first(),
    "coronal": {"affine": base_affine()[:, [1, 0, 2, 3]], "shape": (40, 24, 48)},
    "anisotropic": {"affine": base_affine((4.8, 1.1, 0.9)), "shape": (20, 64, 70)},
    "tilted": _tilted(),
}

TURNED = ("oblique", "steep")


@pytest.fixture(scope="module", params=SCANS)
def scan(request, tmp_path_factory):
    """The slices of one scan, and the store made of them without a change of spacing."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    ingested(folder, **SCANS[request.param])
    return request.param, folder


def ingested(folder: Path, **scan) -> None:
    """Write a scan below a folder, and make a store of it."""
    save_all(folder / "scan", series("WHO", **scan))
    (folder / "key").write_text("0123456789abcdef" * 4)
    options = IngestOptions(workers=0, key_file=folder / "key", cache_folder=folder / "cache")
    ingest([folder / "scan"], folder / "s.zarr", Recipe(spacing=None, superpatch=16), options)


def image_of(folder: Path) -> tuple[OmeImage, Store]:
    store = Store.open(folder / "s.zarr")
    (volume,) = store.volumes()
    return OmeImage(store.path / volume.prefix), store


def dicom_corners(folder: Path) -> np.ndarray:
    """The corner voxels by PS3.3 C.7.6.2.1.1, and the same by highdicom where it takes the stack."""
    slices = [pydicom.dcmread(path) for path in sorted((folder / "scan").rglob("*")) if path.is_file()]
    points = []
    for one in slices:
        origin = np.array(one.ImagePositionPatient, np.float64)
        across, down = np.array(one.ImageOrientationPatient, np.float64).reshape(2, 3)
        between_rows, between_columns = map(float, one.PixelSpacing)
        for row, column in product((0, one.Rows - 1), (0, one.Columns - 1)):
            place = origin + column * between_columns * across + row * between_rows * down
            points.append((float(origin @ np.cross(across, down)), *place))
    points.sort()
    found = in_order(np.array([point[1:] for point in points[:4] + points[-4:]]))
    volume = highdicom.get_volume_from_series(slices, apply_presentation_lut=False)
    corners = np.array([[*index, 1] for index in product(*((0, n - 1) for n in volume.spatial_shape))])
    np.testing.assert_allclose(found, in_order((corners @ volume.affine.T)[:, :3]), rtol=0, atol=NEAR_MM)
    return found


@pytest.mark.parametrize("scan", [name for name in SCANS if name != "tilted"], indirect=True)
def test_every_corner_voxel_lies_where_dicom_puts_it(scan):
    """But of a sheared stack, which is resampled: the next test tells by its HU where its voxels lie."""
    _, folder = scan
    image, _ = image_of(folder)
    np.testing.assert_allclose(image.corners(), dicom_corners(folder), rtol=0, atol=NEAR_MM)


def test_the_hu_there_are_those_of_the_phantom(scan):
    name, folder = scan
    image, store = image_of(folder)
    (volume,) = store.volumes()
    hu, valid = image.hu(), valid_voxels(SuperpatchReader(store), volume)
    places = np.stack([image.lps((i, 0, 0)) for i in (0, 1)])
    steps = np.stack([image.lps(np.eye(3)[axis]) - places[0] for axis in range(3)], axis=1)
    index = np.moveaxis(np.indices(hu.shape, dtype=np.float64), 0, -1)
    error = np.abs(hu - analytic_hu(index @ steps.T + places[0]))[valid]
    most, mean = (32.0, 3.5) if name == "tilted" else (1.0, 0.5)
    assert error.max() <= most and error.mean() <= mean


def test_the_store_is_intact_and_says_how_it_is_turned(scan):
    name, folder = scan
    image, store = image_of(folder)
    assert verify(store).problems == ()
    (to_lps,) = image.read.metadata.coordinateTransformations
    assert (to_lps.type == "identity") == (name not in TURNED)


@pytest.mark.parametrize("scan", TURNED, indirect=True)
def test_a_store_without_its_affine_would_have_been_noticed(scan, tmp_path):
    _, folder = scan
    shutil.copytree(folder / "s.zarr", tmp_path / "s.zarr")
    _, store = image_of(tmp_path)
    (volume,) = store.volumes()
    path = store.path / volume.prefix / "zarr.json"
    document = json.loads(path.read_text())
    (scales,) = document["attributes"]["ome"]["multiscales"]
    scales["coordinateTransformations"] = [{"type": "identity", "input": {"name": "grid"}, "output": {"name": "lps"}}]
    path.write_text(json.dumps(document))
    assert any("expected the affine" in problem for problem in verify(store).problems)
    assert np.abs(image_of(tmp_path)[0].corners() - dicom_corners(folder)).max() > 5


@pytest.mark.parametrize(("extra", "named"), [({}, True), ({"AnatomicalOrientationType": "QUADRUPED"}, False)])
def test_directions_are_named_but_for_an_animal_on_four_legs(extra, named, tmp_path):
    ingested(tmp_path, extra=extra)
    _, store = image_of(tmp_path)
    (volume,) = store.volumes()
    (scales,) = json.loads((store.path / volume.prefix / "zarr.json").read_text())["attributes"]["ome"]["multiscales"]
    axes = [axis for system in scales["coordinateSystems"] for axis in system["axes"]]
    assert [("orientation" in axis) for axis in axes] == [named] * len(axes)
