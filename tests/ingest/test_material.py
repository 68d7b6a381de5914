"""Maps out of a multi-energy scan are told by image type, unit or description, and no plain scan is taken for one."""

from __future__ import annotations

import pydicom
import pytest
from support.ct_phantom import base_affine
from support.sources import Workplace, phantom_hu

from maesil.ingest.header import read_headers
from maesil.ingest.material import material_named
from maesil.store.recipe import Recipe
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series

MAPS = [
    "VNC", "DE_VNC 1.0 Qr40", "Abdomen LiverVNC", "VNCa bone", "VNC[HU*]", "Virtual Non-Contrast",
    "virtual_unenhanced", "True virtual non contrast", "Virtual True Non-Contrast", "Iodine", "Iodine Map",
    "IODINE_OVERLAY", "Iodine Density [mg/ml]", "Iodine no Water", "Iodine(Water)", "WATER(IODINE)", "MD Iodine 70",
    "Material Density", "Z Effective", "ZEFF", "Eff: Rho/Z", "Electron Density", "CaSupp 50", "Calcium Suppressed",
    "Uric Acid", "Lung PBV", "Perfused Blood Volume",
]  # fmt: skip
PLAIN = [
    "", "Thorax", "Abdomen with iodine", "non contrast", "Non-Contrast Chest", "unenhanced", "Mono 70 keV",
    "VMI 55 keV", "Monoenergetic Plus", "Electron density phantom", "Electron-Density plug", "Calcium score",
    "fat saturated", "Vncent", "conventional [HU]", "Iodine 370 portal venous", "virtual colonoscopy", "PBVX",
    "water phantom", "Material test",
]  # fmt: skip


@pytest.fixture(scope="module")
def slice_file(tmp_path_factory):
    """A slice of a plain CT."""
    folder = tmp_path_factory.mktemp("material")
    write_dicom_series(folder, phantom_hu()[:1], base_affine(), SeriesIdentity())
    (path,) = folder.iterdir()
    return path


def named(slice_file, tmp_path, **elements):
    dataset = pydicom.dcmread(slice_file)
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(tmp_path / "slice.dcm")
    (header,) = read_headers(tmp_path / "slice.dcm")
    return material_named(header)


@pytest.mark.parametrize("description", MAPS)
def test_descriptions_of_a_map(slice_file, tmp_path, description):
    assert str(named(slice_file, tmp_path, SeriesDescription=description)).startswith("SeriesDescription says ")


@pytest.mark.parametrize("description", PLAIN)
def test_descriptions_of_a_plain_scan(slice_file, tmp_path, description):
    assert named(slice_file, tmp_path, SeriesDescription=description) is None


@pytest.mark.parametrize(
    ("elements", "where"),
    [
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "MAT_REMOVED"]}, "ImageType MAT_REMOVED"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "DE_VNC"]}, "ImageType VNC"),
        ({"RescaleType": "MGML"}, "RescaleType MGML"),
        ({"RescaleType": "HU", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "VMI"]}, None),
    ],
)
def test_image_types_and_units(slice_file, tmp_path, elements, where):
    assert named(slice_file, tmp_path, **elements) == where


def test_a_word_of_a_patient_does_not_reach_the_verdict(slice_file, tmp_path):
    said = named(slice_file, tmp_path, SeriesDescription="Mueller^Hans VNC 1961")
    assert said == "SeriesDescription says VNC"


def test_a_map_named_by_its_description_alone_is_left_aside_and_taken_on_purpose(tmp_path):
    place = Workplace(tmp_path)
    for folder, name in (("plain", "Thorax"), ("map", "Thorax VNC")):
        write_dicom_series(place.sources / folder, phantom_hu(), base_affine(), SeriesIdentity(series=folder))
        for path in (place.sources / folder).iterdir():
            dataset = pydicom.dcmread(path)
            dataset.SeriesDescription = name
            dataset.save_as(path)
    summary = place.ingest()
    verdicts = {(verdict.path.parent.name, verdict.status, verdict.code) for verdict in summary.files}
    assert verdicts == {("plain", "used", "committed"), ("map", "skipped", "material_map")}
    assert len(summary.committed) == 1 and not summary.refused_volumes

    taken = place.ingest(recipe=Recipe(spacing=None, superpatch=32, accept=("material_map",)), update=True)
    assert {verdict.status for verdict in taken.files} == {"used"}
    notes = sorted("accepted_material_map" in volume.notes for volume in taken.committed)
    assert notes == [False, True]
