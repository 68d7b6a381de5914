"""Cone-beam CT is told by the words of its header, and no other scanner is taken for one."""

from __future__ import annotations

import pydicom
import pytest
from support.ct_phantom import base_affine
from support.sources import Workplace, phantom_hu

from maesil.ingest.cone_beam import DEVICE_TAGS, TEXT_TAGS, is_cone_beam
from maesil.store.recipe import Recipe
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series


def said(**texts: str) -> bool:
    return is_cone_beam({tag: texts.get(tag, "") for tag in (*TEXT_TAGS, *DEVICE_TAGS)})


@pytest.mark.parametrize(
    ("maker", "model"),
    [
        ("Varian Medical Systems", "On-Board Imager"),
        ("ELEKTA", "XVI"),
        ("Imaging Sciences International", "17-19 i-CAT"),
        ("QR srl", "NewTom VGi"),
        ("Planmeca", "ProMax"),
        ("J.MORITA.MFG.CORP.", "3D Accuitomo"),
        ("Sirona", "ORTHOPHOS XG"),
        ("Carestream Health", "CS 9300"),
        ("Medtronic", "O-arm"),
        ("SIEMENS", "AXIOM-Artis"),
        ("Ziehm Imaging", "Vision RFD 3D"),
        ("VATECH", "PaX-i3D"),
        ("Xoran Technologies", "MiniCAT"),
        ("Varian Medical Systems", "TrueBeam"),
    ],
)
def test_devices_with_a_cone_beam(maker, model):
    assert said(Manufacturer=maker, ManufacturerModelName=model)


@pytest.mark.parametrize("tag", TEXT_TAGS)
@pytest.mark.parametrize(
    "text", ["CBCT", "Head_CBCT_day_3", "iCBCT pelvis", "Cone Beam", "conebeam", "DynaCT Head", "XperCT"]
)
def test_words_of_a_cone_beam(tag, text):
    assert said(**{tag: text})


@pytest.mark.parametrize(
    ("maker", "model"),
    [
        ("SIEMENS", "SOMATOM Definition AS+"),
        ("SIEMENS", "Sensation 64"),
        ("Siemens Healthineers", "NAEOTOM Alpha"),
        ("GE MEDICAL SYSTEMS", "LightSpeed VCT"),
        ("GE MEDICAL SYSTEMS", "Revolution CT"),
        ("GE MEDICAL SYSTEMS", "Discovery CT750 HD"),
        ("Philips", "Brilliance 64"),
        ("Philips", "iCT 256"),
        ("Philips", "Vereos PET/CT"),
        ("Philips", "Big Bore"),
        ("TOSHIBA", "Aquilion ONE"),
        ("Canon Medical Systems", "Aquilion Precision"),
        ("Hitachi", "SCENARIA"),
        ("UIH", "uCT 960+"),
        ("Mobius Imaging", "Airo"),
        ("NeuroLogica", "CereTom"),
        ("ACCURAY", "ClearRT"),
        ("", ""),
    ],
)
@pytest.mark.parametrize(
    "text", ["", "Thorax", "ORIGINAL\\PRIMARY\\AXIAL\\CT_SOM5 SPI", "CB chest", "Beam hardening", "Articular"]
)
def test_other_scanners_have_none(maker, model, text):
    assert not said(Manufacturer=maker, ManufacturerModelName=model, SeriesDescription=text, ImageType=text)


def test_the_volume_carries_a_note_and_is_refused_on_request(tmp_path):
    place = Workplace(tmp_path)
    write_dicom_series(place.sources, phantom_hu(), base_affine(), SeriesIdentity())
    for path in place.sources.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.Manufacturer, dataset.ManufacturerModelName = "ELEKTA", "XVI"
        dataset.save_as(path)
    (volume,) = place.ingest().committed
    assert "cone_beam" in volume.notes
    strict = place.ingest(recipe=Recipe(spacing=None, superpatch=32, refuse=("cone_beam",)), update=True)
    assert {verdict.code for verdict in strict.files} == {"cone_beam"} and strict.refused_volumes == 1
