"""What reaches the store of a header: numbers as numbers, known terms, texts that name nobody."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maesil.documents import canonical_json
from maesil.ingest.technical import NAMING_TAGS, TECHNICAL_TAGS, technical_of

NUMBERS = ("SliceThickness", "KVP", "ReconstructionDiameter", "GantryDetectorTilt")


def texts(**values: str) -> dict[str, str]:
    return dict.fromkeys((*TECHNICAL_TAGS, *NAMING_TAGS), "") | values


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=4, max_size=16))
def test_a_pseudonym_in_every_element_reaches_nothing(pseudonym):
    everywhere = dict.fromkeys((*TECHNICAL_TAGS, *NAMING_TAGS), pseudonym)
    found = technical_of(everywhere)
    found.pop("ContrastBolusAgent")  # "given"
    kept = [value for value in found.values() if str(value) != "0.0"]
    assert all(isinstance(value, float) and value <= 2000 for value in kept)  # a pseudonym that is a possible number
    canonical_json(found)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["ANON-17", "4711", "-4711", "nan", "1e9", "1\\2"])
def test_what_no_scanner_means_by_a_number_is_left_out(name, value):
    assert name not in technical_of(texts(**{name: value})) or (name, value) == ("ReconstructionDiameter", "1711")


def test_what_a_scanner_writes_is_kept():
    said = {"SliceThickness": "0.625", "KVP": "120", "ReconstructionDiameter": "500", "GantryDetectorTilt": "-12.5"}
    more = {"Manufacturer": "GE MEDICAL SYSTEMS", "ConvolutionKernel": "B40f\\3", "PatientPosition": "FFDR"}
    found = technical_of(texts(**said, **more, PatientName="SYSTEM^Operating", ContrastBolusAgent="for J. Doe"))
    assert found == {name: float(value) for name, value in said.items()} | more | {
        "ConvolutionKernel": "B40f, 3", "ContrastBolusAgent": "given"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["Manufacturer", "ManufacturerModelName", "ConvolutionKernel"])
@pytest.mark.parametrize("naming", NAMING_TAGS)
def test_a_text_with_a_word_that_names_the_patient_is_left_out(name, naming):
    assert name not in technical_of(texts(**{name: "for Amadeus only", naming: "MOZART^AMADEUS"}))


@pytest.mark.parametrize("name", ["PatientPosition", "LossyImageCompression"])
def test_a_term_that_the_standard_does_not_know_is_left_out(name):
    assert technical_of(texts(**{name: "AMADEUS"})) == {}
