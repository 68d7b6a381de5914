"""Reading values of DICOM headers: as the file says they are written, not as the dictionary would have them.

An element written under another value representation (PS3.5 7.1.2: the one in the file counts), or the same number
twice where one is meant, is read for what it says. What cannot be meant is refused by the name of its element; a
refusal holds no text of the header, since that may name the patient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from maesil.codes import RefusalCode
from maesil.errors import Refused

Tags = Mapping[str, tuple[BaseTag, str]]
"""Tag and value representation by keyword."""

_BINARY = {"US": "u2", "SS": "i2", "UL": "u4", "SL": "i4", "UV": "u8", "SV": "i8", "FL": "f4", "FD": "f8"}
_SAYS_NOTHING = ("", "UN", "OB", "OW", "US or SS")


def tags_of(*names: str) -> dict[str, tuple[BaseTag, str]]:
    """Return tag and value representation of attributes by their keywords."""
    return {name: (Tag(name), dictionary_VR(Tag(name))) for name in names}


def texts_of(dataset: Dataset, tags: Tags) -> dict[str, str]:
    """Return values as texts, empty where absent: far faster than having pydicom convert each of them."""
    return {name: _text(dataset.get_item(tag), vr) for name, (tag, vr) in tags.items()}


def _text(element: Any, vr: str) -> str:
    if element is None or element.value is None:
        return ""
    value = element.value
    if isinstance(value, bytes):  # not yet converted
        vr = vr if (element.VR or "") in _SAYS_NOTHING else element.VR
        if vr in _BINARY:
            order = "<" if element.is_little_endian else ">"
            return "\\".join(map(str, np.frombuffer(value, order + _BINARY[vr]).tolist()))
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1")
    elif not isinstance(value, str) and isinstance(value, Sequence):
        value = "\\".join(map(str, value))
    return str(value).strip(" \0")


def numbers_in(text: str, count: int) -> tuple[float, ...] | None:
    """Return so many finite numbers; None unless the text is just that."""
    try:
        numbers = tuple(map(float, text.split("\\")))
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def one_number(text: str, name: str, code: RefusalCode = "bad_header") -> float | None:
    """Return the number that an element holds once, or several times over; None where it is absent or empty.

    `Refused` with the code if it holds anything else.
    """
    if not text:
        return None
    values = text.split("\\")
    numbers = numbers_in(text, len(values))
    if numbers is None or len(set(numbers)) > 1:
        found = "several numbers" if numbers else "something else"
        raise Refused(code, f"expected one number in {name}, found {found}")
    return numbers[0]


def whole_number(text: str, name: str) -> int | None:
    """Return the whole number of an element, as `one_number`."""
    number = one_number(text, name)
    if number is not None and number != int(number):
        raise Refused("bad_header", f"expected a whole number in {name}, found {number:g}")
    return None if number is None else int(number)


def number_of(dataset: Dataset, name: str, code: RefusalCode = "bad_header") -> float | None:
    """Return the number of one element of a data set, as `one_number`."""
    return one_number(texts_of(dataset, tags_of(name))[name], name, code)


def whole_number_of(dataset: Dataset, name: str) -> int | None:
    """Return the whole number of one element of a data set, as `whole_number`."""
    return whole_number(texts_of(dataset, tags_of(name))[name], name)
