"""Plain files read by `read_plain` are what pydicom reads; whatever else there is, it leaves to pydicom."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from maesil.ingest.plain_file import read_plain

CHARACTER_SET = Tag("SpecificCharacterSet")
WANTED = frozenset(
    int(Tag(name))
    for name in ("SOPClassUID", "PatientID", "ImagePositionPatient", "PixelSpacing", "Rows", "SeriesDescription",
                 "KVP", "SharedFunctionalGroupsSequence")
)  # fmt: skip


def a_file(syntax=ExplicitVRLittleEndian, *, nested=True, undefined=False, text="Größe", pixels=True) -> bytes:
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, "1.2.3"
    dataset.PatientID, dataset.SeriesDescription, dataset.KVP = "A^1", text, None
    dataset.ImagePositionPatient, dataset.PixelSpacing = [-1.5, 2, 3e-3], ["0.7", "0.70"]
    dataset.Rows = dataset.Columns = 4
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 15, 1, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.add_new((0x0009, 0x0010), "LO", "a private creator")
    dataset.add_new((0x0009, 0x1001), "OB", b"\1\2\3\4")
    if nested:
        inner, outer = Dataset(), Dataset()
        inner.PatientID = "inside"
        outer.ReferencedImageSequence = Sequence([inner])
        dataset.ReferencedStudySequence = Sequence([outer, Dataset()])
        for item in (dataset, outer):
            for element in item:
                if element.VR == "SQ":
                    element.is_undefined_length = undefined
                    for one in element.value:
                        one.is_undefined_length_sequence_item = undefined
    if pixels:
        dataset.PixelData = np.arange(16, dtype="<i2").tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def by_pydicom(data: bytes, tags=None) -> Dataset:
    options = {"stop_before_pixels": True, "specific_tags": list(tags)} if tags else {}
    return pydicom.dcmread(io.BytesIO(data), force=True, **options)


def without_sequences(dataset: Dataset) -> dict:
    return {e.tag: (e.VR, e.value) for e in dataset if e.VR != "SQ"}


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_the_same_as_pydicom(syntax, undefined):
    data = a_file(syntax, undefined=undefined)
    for tags in (WANTED, None):
        ours, theirs = read_plain(io.BytesIO(data), tags), by_pydicom(data, tags)
        assert ours is not None
        assert without_sequences(ours) == without_sequences(theirs)
        assert ours.file_meta == theirs.file_meta
        assert ours.original_encoding == theirs.original_encoding
    np.testing.assert_array_equal(ours.pixel_array, theirs.pixel_array)


def test_a_header_longer_than_the_first_read():
    dataset = pydicom.dcmread(io.BytesIO(a_file()))
    dataset.add_new((0x0019, 0x0010), "LO", "a private creator")
    dataset.add_new((0x0019, 0x1001), "OB", bytes(200_000))
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert read_plain(io.BytesIO(buffer.getvalue()), WANTED) == by_pydicom(buffer.getvalue(), WANTED)


def functional_groups(data: bytes) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.SharedFunctionalGroupsSequence = Sequence([Dataset()])
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def encapsulated(data: bytes) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.compress(pydicom.uid.RLELossless)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


NOT_PLAIN = {
    "big endian": lambda data: a_file(ExplicitVRBigEndian),
    "no preamble": lambda data: data[132:],
    "functional groups": functional_groups,
    "encapsulated pixels": encapsulated,
    "cut pixels": lambda data: data[:-3],
    "cut header": lambda data: data[:400],
    "no pixels": lambda data: a_file(pixels=False),
    "unknown value representation": lambda data: data.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00QQ"),
    "explicit data called implicit": lambda data: data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0"),
    "tags out of order": lambda data: data.replace(b"\x10\x00\x20\x00LO", b"\x08\x00\x01\x00LO"),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_is_left_alone(name):
    assert read_plain(io.BytesIO(NOT_PLAIN[name](a_file()))) is None


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from([a_file(), a_file(ImplicitVRLittleEndian), a_file(undefined=True)]),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 2000),
    wanted=st.sampled_from([WANTED, None]),
)
def test_damaged_at_random_it_is_read_as_by_pydicom_or_not_at_all(data, changes, cut, wanted):
    damaged = bytearray(data)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    damaged = bytes(damaged[: len(damaged) - cut % 50])
    ours = read_plain(io.BytesIO(damaged), wanted)
    if ours is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = by_pydicom(damaged, wanted)
        for tag in set(ours.keys()) - {CHARACTER_SET}:  # pydicom has converted that one already
            mine, other = ours.get_item(tag), theirs.get_item(tag)
            assert (mine.value or None) == (other.value or None), tag
