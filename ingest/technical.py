"""The technical description of a source: the only tags that reach the store, by an allow list, and checked one by one.

An anonymiser may write a pseudonym into any element, numeric ones among them. So numbers are kept as numbers and within
what a scanner can mean by them, coded terms only where the standard knows them, and texts only where no word of them
is one that names the patient.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydicom.dataset import Dataset

from maesil.ingest.values import numbers_in, tags_of, texts_of
from maesil.store.records import Technical

_NUMBERS = {
    "SliceThickness": (0.01, 100.0),
    "KVP": (10.0, 500.0),
    "ReconstructionDiameter": (1.0, 2000.0),
    "GantryDetectorTilt": (-90.0, 90.0),
}
"""Least and largest value that a scanner can mean."""
_TERMS = {
    "PatientPosition": re.compile(r"(HF|FF|LF|RF|AF|PF)(S|P|DR|DL)"),
    "LossyImageCompression": re.compile(r"0[01]"),
}
"""PS3.3 C.7.3.1.1.2 and C.7.6.1.1.5."""
_TEXTS = ("Manufacturer", "ManufacturerModelName", "ConvolutionKernel")
_GIVEN = "ContrastBolusAgent"
"""Free text; that there was one is all that is needed."""
TECHNICAL_TAGS = (*_NUMBERS, *_TERMS, *_TEXTS, _GIVEN)
NAMING_TAGS = ("PatientID", "PatientName", "OtherPatientIDs", "AccessionNumber")
"""What names the patient or the visit: none of its words is taken for a technical text."""
_TAGS = tags_of(*TECHNICAL_TAGS, *NAMING_TAGS)
_WORD = re.compile(r"[^\s\\/^=,;:\"'<>()\[\]{}|]+")
_SHORTEST = 4
"""Shorter words are words of anybody."""


def technical_tags(dataset: Dataset) -> Technical:
    """Return the allow-listed tags as JSON-ready values."""
    return technical_of(texts_of(dataset, _TAGS))


def technical_of(texts: Mapping[str, str]) -> Technical:
    """Return the same from the texts of the elements."""
    naming = {word for tag in NAMING_TAGS for word in _words(texts[tag])}
    found: Technical = {}
    for tag, (low, high) in _NUMBERS.items():
        number = numbers_in(texts[tag], 1)
        if number is not None and low <= number[0] <= high:
            found[tag] = number[0]
    found |= {tag: texts[tag] for tag, known in _TERMS.items() if known.fullmatch(texts[tag])}
    for tag in _TEXTS:
        if texts[tag] and naming.isdisjoint(_words(texts[tag])):
            found[tag] = ", ".join(part.strip() for part in texts[tag].split("\\"))
    if texts[_GIVEN]:
        found[_GIVEN] = "given"
    return found


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text) if len(word) >= _SHORTEST}
