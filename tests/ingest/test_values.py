"""Header values are read as the file says they are written, and refused by name without a word of theirs."""

from __future__ import annotations

import struct

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from maesil.errors import Refused
from maesil.ingest.values import number_of, numbers_in, tags_of, texts_of, whole_number_of


def raw(name: str, vr: str | None, value: bytes) -> Dataset:
    """A data set of one element as it stands in a file."""
    tag = Tag(name)
    return Dataset({tag: RawDataElement(tag, vr, len(value), value, 0, vr is None, True)})


@pytest.mark.parametrize(
    ("vr", "value"),
    [("US", struct.pack("<H", 56)), ("UL", struct.pack("<I", 56)), ("SS", struct.pack("<h", 56)), ("IS", b"56"),
     ("DS", b"56.0"), ("FD", struct.pack("<d", 56)), ("LO", b" 56 "), ("UN", struct.pack("<H", 56)),
     (None, struct.pack("<H", 56)), ("IS", b"56\\56")],
)  # fmt: skip
def test_a_number_is_the_same_in_any_value_representation(vr, value):
    assert whole_number_of(raw("Rows", vr, value), "Rows") == 56


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6))
def test_decimal_strings_and_doubles_say_the_same(numbers):
    text = "\\".join(map(repr, numbers)).encode()
    tags = tags_of("ImagePositionPatient")
    as_text = texts_of(raw("ImagePositionPatient", "DS", text), tags)["ImagePositionPatient"]
    packed = struct.pack(f"<{len(numbers)}d", *numbers)
    as_double = texts_of(raw("ImagePositionPatient", "FD", packed), tags)["ImagePositionPatient"]
    assert numbers_in(as_text, len(numbers)) == numbers_in(as_double, len(numbers)) == tuple(numbers)


@pytest.mark.parametrize("value", [b"DOE^JANE", b"1\\2", b"1\\DOE", b"nan", b"inf"])
def test_what_is_no_one_number_is_refused_by_name_without_its_text(value):
    with pytest.raises(Refused) as caught:
        number_of(raw("RescaleSlope", "DS", value), "RescaleSlope", "bad_rescale")
    assert caught.value.code == "bad_rescale" and "RescaleSlope" in str(caught.value)
    assert "DOE" not in str(caught.value)


@pytest.mark.parametrize("value", [b"", b" ", None])
def test_absent_and_empty_are_none(value):
    data = pydicom.Dataset() if value is None else raw("RescaleSlope", "DS", value)
    assert number_of(data, "RescaleSlope") is None


def test_half_a_row_is_refused():
    with pytest.raises(Refused, match="whole number in Rows"):
        whole_number_of(raw("Rows", "DS", b"56.5"), "Rows")
