"""Single DICOM slices: HU as the header says, padding as the standard says, a digest of what decides a voxel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset
from support.ct_phantom import base_affine
from support.sources import phantom_hu

from maesil.documents import canonical_json
from maesil.errors import Refused
from maesil.ingest.dicom import pixel_digest, read_slice_hu
from maesil.ingest.header import read_headers
from maesil.ingest.technical import technical_tags
from maesil.synthetic.dicom import SeriesIdentity, ct_series, save_all
from maesil.types import AIR_HU

HU = phantom_hu()[12:13]


def slice_of(hu=HU, **identity) -> FileDataset:
    (data,) = ct_series(hu, base_affine(), SeriesIdentity(**identity))
    return data


def saved(folder: Path, data: FileDataset, name: str = "slice") -> Path:
    (path,) = save_all(folder, [data], [name])
    return path


@settings(max_examples=25, deadline=None)
@given(
    slope=st.sampled_from([1.0, 0.37, 2.0, -1.0, 1e-3 * 1831]),
    intercept=st.sampled_from([-1024.0, 0.0, -8192.5, 12.25]),
)
def test_hu_are_slope_times_value_plus_intercept(tmp_path_factory, slope, intercept):
    data = slice_of(rescale=(slope, intercept))
    stored = np.frombuffer(data.PixelData, "<i2").reshape(data.Rows, data.Columns).astype(np.float64)
    hu, valid, notes = read_slice_hu(saved(tmp_path_factory.mktemp("s"), data))
    np.testing.assert_allclose(hu, stored * slope + intercept, atol=1e-3)
    assert valid.all() and not notes and hu.dtype == np.float32


@pytest.mark.parametrize(
    ("values", "first", "limit", "padding"),
    [
        ("SS", -2000, None, [-2000]),
        ("SS", -2000, -1990, [-2000, -1995, -1990]),
        ("SS", -1990, -2000, [-2000, -1995, -1990]),
    ],
)
def test_padding_is_air_and_not_valid(tmp_path, values, first, limit, padding):
    data = slice_of(rescale=(1.0, 0.0))
    stored = np.frombuffer(data.PixelData, "<i2").reshape(data.Rows, data.Columns).copy()
    stored[0, :3], stored[1, :3] = (-2000, -1995, -1990), (-1400, 0, 3000)
    data.PixelData = stored.tobytes()
    data.add_new("PixelPaddingValue", values, first)
    if limit is not None:
        data.add_new("PixelPaddingRangeLimit", values, limit)
    hu, valid, _ = read_slice_hu(saved(tmp_path, data))
    np.testing.assert_array_equal(~valid, np.isin(stored, padding))
    assert (hu[~valid] == AIR_HU).all()
    np.testing.assert_array_equal(hu[valid], stored[valid])


@pytest.mark.parametrize("value", [0, 40, 1000])
def test_a_padding_value_among_tissue_is_not_believed(tmp_path, value):
    data = slice_of(rescale=(1.0, 0.0))
    data.add_new("PixelPaddingValue", "SS", value)
    hu, valid, notes = read_slice_hu(saved(tmp_path, data))
    assert valid.all() and len(notes) <= 1
    np.testing.assert_array_equal(hu, HU[0])


def _set(**values):
    return lambda data: [setattr(data, name, value) for name, value in values.items()]


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("modality_lut", _set(ModalityLUTSequence=[pydicom.Dataset()])),
        ("not_hu", _set(RescaleType="OD")),
        ("bad_rescale", _set(RescaleSlope=0)),
        ("colour", _set(SamplesPerPixel=3)),
        ("no_pixels", lambda data: delattr(data, "PixelData")),
        ("no_pixels", _set(PixelData=b"")),
        ("bad_pixels", lambda data: setattr(data, "PixelData", data.PixelData[:100])),
    ],
)
def test_what_is_no_hu_is_refused_with_its_code(tmp_path, code, change):
    data = slice_of()
    change(data)
    with pytest.raises(Refused) as caught:
        read_slice_hu(saved(tmp_path, data))
    assert caught.value.code == code


DECIDING = {
    "position": _set(ImagePositionPatient=[0, 0, 0]),
    "orientation": _set(ImageOrientationPatient=[0, 1, 0, 1, 0, 0]),
    "spacing": _set(PixelSpacing=[1, 1]),
    "slope": _set(RescaleSlope=2),
    "intercept": _set(RescaleIntercept=-1000),
    "padding": lambda data: data.add_new("PixelPaddingValue", "SS", -2000),
    "one pixel": lambda data: setattr(data, "PixelData", data.PixelData[:-1] + bytes([data.PixelData[-1] ^ 1])),
    "rescale type": _set(RescaleType="OD"),
}
IRRELEVANT = {
    "names": _set(PatientName="X", PatientID="Y", SeriesDescription="Z", StudyDate="19990101"),
    "uids": _set(SOPInstanceUID="1.2.3", SeriesInstanceUID="1.2", StudyInstanceUID="1.9"),
    "numbers": _set(InstanceNumber=77, SeriesNumber=4),
    "display": _set(WindowCenter=40, WindowWidth=400),
}


@pytest.mark.parametrize("what", DECIDING)
def test_the_digest_changes_with_what_decides_a_voxel(tmp_path, what):
    before = pixel_digest(saved(tmp_path, slice_of(), "a"))
    data = slice_of()
    DECIDING[what](data)
    assert pixel_digest(saved(tmp_path, data, "b")) != before


@pytest.mark.parametrize("what", IRRELEVANT)
def test_the_digest_ignores_the_rest(tmp_path, what):
    before = pixel_digest(saved(tmp_path, slice_of(), "a"))
    data = slice_of()
    IRRELEVANT[what](data)
    assert pixel_digest(saved(tmp_path, data, "b")) == before


def test_technical_tags_are_allow_listed_and_fit_for_json():
    data = slice_of(patient="DOE")
    data.ContrastBolusAgent = "OMNIPAQUE for J. Doe"
    data.SliceThickness = "2.5"
    data.ConvolutionKernel = ["B40f", "3"]
    data.PatientComments = "Doe"
    found = technical_tags(data)
    assert b"oe" not in canonical_json(found).lower().replace(b"kernel", b"")
    assert found["SliceThickness"] == 2.5 and found["ContrastBolusAgent"] == "given"


@pytest.mark.parametrize("value", [["1", "2"], "x", ["1", "2", "x"], ["1", "2", "nan"], ["1", "2", "inf"]])
def test_positions_that_are_no_three_numbers_are_none(tmp_path, value):
    data = slice_of()
    raw = "\\".join(value) if isinstance(value, list) else value
    data["ImagePositionPatient"] = pydicom.DataElement("ImagePositionPatient", "LO", raw.split("\\"))
    path = saved(tmp_path, data)
    content = path.read_bytes().replace(b"\x20\x00\x32\x00LO", b"\x20\x00\x32\x00DS")
    path.write_bytes(content)
    try:
        assert read_headers(path)[0].position is None
    except Refused as refusal:
        assert refusal.code.startswith("bad_")


def test_damaged_lossless_jpeg_gives_no_path_away(tmp_path):
    """GDCM's messages quote the file name, and a refusal is written into the store."""
    data = slice_of()
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    data.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xc3" + bytes(50)])
    data["PixelData"].is_undefined_length = True
    with pytest.raises(Refused) as caught:
        read_slice_hu(saved(tmp_path, data, "DOE-JANE"))
    assert caught.value.code == "bad_pixels"
    assert "DOE" not in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)
