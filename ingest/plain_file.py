"""Reading plain DICOM files several times faster than pydicom does, and leaving all others to it.

Plain is what nearly every file is: a preamble, little endian, not deflated, known value representations, tags in order,
lengths that lead somewhere (PS3.5 chapter 7, PS3.10 chapter 7). Values stay raw, in pydicom's own types, which convert
them. For anything else `read_plain` returns None; it never guesses.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import IO, Any

from pydicom.charset import convert_encodings, default_encoding
from pydicom.dataelem import RawDataElement, convert_raw_data_element, empty_value_for_VR
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.tag import BaseTag

_FIRST_READ = 1 << 15
_MOST_READ = 1 << 24
_PREAMBLE = 128
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_DEEPEST = 16
_TRANSFER_SYNTAX, _CHARACTER_SET, _GROUP_8 = BaseTag(0x00020010), 0x00080005, 0x00080000
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_GROUPS_OF_PIXELS = (0x0028, 0x5200)
"""Modality look-up tables and functional groups: a sequence that describes pixels is pydicom's to read."""
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_TEXT_OF = {vr: vr.decode() for vr in _LONG | _SHORT}
_IMPLICIT = b"1.2.840.10008.1.2"
_EXPLICIT = (b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2.4.", b"1.2.840.10008.1.2.5")
_shorts, _short, _long = (
    struct.Struct("<HH").unpack_from,
    struct.Struct("<H").unpack_from,
    struct.Struct("<I").unpack_from,
)

Elements = dict[BaseTag, RawDataElement]


class _NotPlain(Exception):
    """Something that is pydicom's to judge."""


class _NeedsMore(_NotPlain):
    """The bytes end before what was looked for."""


def read_plain(stream: IO[bytes], tags: Collection[int] | None = None) -> FileDataset | None:
    """Return the elements of these tags before the pixels; without tags all but sequences, the pixels among them.

    None if the file is not plain, or a sequence is asked for; the stream is left anywhere.
    """
    data = stream.read(_FIRST_READ)
    while len(data) <= _MOST_READ:
        try:
            dataset, end = _parse(data, tags)
            if tags is None:
                _add_pixels(dataset, data, end, stream)
            return dataset
        except _NeedsMore:
            if not (more := stream.read(len(data))):
                return None
            data += more
        except _NotPlain:
            return None
    return None


def _parse(data: bytes, tags: Collection[int] | None) -> tuple[FileDataset, int]:
    """Return what stands before the pixels, and where they begin."""
    if data[_PREAMBLE : _PREAMBLE + 4] != b"DICM":
        raise _NotPlain
    meta, start = _elements(data, _PREAMBLE + 4, implicit=False, tags=None, until=_GROUP_8)
    syntax = bytes(meta[_TRANSFER_SYNTAX].value or b"").rstrip(b" \0") if _TRANSFER_SYNTAX in meta else b""
    implicit = syntax == _IMPLICIT
    if not implicit and not (syntax in _EXPLICIT or syntax.startswith(_EXPLICIT[1])):
        raise _NotPlain
    if implicit and data[start + 4 : start + 6] in _TEXT_OF:  # explicit after all, as pydicom would find
        raise _NotPlain
    elements, end = _elements(data, start, implicit=implicit, tags=tags, until=_PIXELS[0])
    if _tag(data, end) not in _PIXELS:
        raise _NotPlain
    _length(data, end, implicit)  # a file cut just here is not plain
    dataset = FileDataset("", elements, data[:_PREAMBLE], _file_meta(meta), implicit, True)  # type: ignore[arg-type]
    dataset.set_original_encoding(implicit, True, _encoding(elements))
    return dataset, end


def _add_pixels(dataset: FileDataset, data: bytes, at: int, stream: IO[bytes]) -> None:
    implicit = bool(dataset.original_encoding[0])
    tag, (vr, length, start) = _tag(data, at), _length(data, at, implicit)
    if length == _UNDEFINED:  # encapsulated
        raise _NotPlain
    stream.seek(start)
    value = stream.read(length)
    if len(value) < length:
        raise _NotPlain
    dataset[tag] = _raw(tag, vr, length, value, start)


def _file_meta(elements: Elements) -> FileMetaDataset:
    meta = FileMetaDataset(elements)  # type: ignore[arg-type]
    meta.set_original_encoding(False, True, default_encoding)
    return meta


def _encoding(elements: Elements) -> Any:
    """Return what pydicom calls the encoding of a data set's texts."""
    if _CHARACTER_SET not in elements:
        return default_encoding
    try:
        return convert_encodings(convert_raw_data_element(elements[BaseTag(_CHARACTER_SET)]).value)
    except Exception:  # pydicom raises anything
        raise _NotPlain from None


def _elements(
    data: bytes, at: int, *, implicit: bool, tags: Collection[int] | None, until: int
) -> tuple[Elements, int]:
    """Return elements in the order of their tags, up to a tag, and where that begins."""
    found: Elements = {}
    last = 0
    while (tag := _tag(data, at)) < until:
        vr, length, start = _length(data, at, implicit)
        if tag <= last:
            raise _NotPlain
        last, asked = tag, tags is None or tag in tags or tag == _CHARACTER_SET
        is_sequence = vr == b"SQ" or length == _UNDEFINED or (implicit and _starts_an_item(data, start, length))
        if is_sequence and (tag in tags if tags else tag >> 16 in _GROUPS_OF_PIXELS):
            raise _NotPlain
        at = _end_of_sequence(data, start, implicit) if length == _UNDEFINED else start + length
        if at > len(data):
            raise _NeedsMore
        if asked and not is_sequence:
            found[BaseTag(tag)] = _raw(tag, vr, length, data[start:at], start)
    return found, at


def _raw(tag: int, vr: bytes, length: int, value: bytes, start: int) -> RawDataElement:
    text = _TEXT_OF[vr] if vr else None
    known = value if length else empty_value_for_VR(text, raw=True)
    return RawDataElement(BaseTag(tag), text, length, known, start, not vr, True)  # type: ignore[arg-type]


def _tag(data: bytes, at: int) -> int:
    if at + 8 > len(data):
        raise _NeedsMore
    group, element = _shorts(data, at)
    return int(group << 16 | element)


def _length(data: bytes, at: int, implicit: bool) -> tuple[bytes, int, int]:
    """Return value representation (empty if implicit), length, and where the value begins."""
    if implicit:
        return b"", _long(data, at + 4)[0], at + 8
    vr = data[at + 4 : at + 6]
    if vr in _SHORT:
        return vr, _short(data, at + 6)[0], at + 8
    if vr not in _LONG:
        raise _NotPlain
    if at + 12 > len(data):
        raise _NeedsMore
    return vr, _long(data, at + 8)[0], at + 12


def _starts_an_item(data: bytes, start: int, length: int) -> bool:
    return length >= 8 and data[start : start + 4] == b"\xfe\xff\x00\xe0"


def _end_of_sequence(data: bytes, at: int, implicit: bool, depth: int = 0) -> int:
    """Return where a sequence of undefined length ends (PS3.5 7.5)."""
    if depth > _DEEPEST:
        raise _NotPlain
    while True:
        tag, (_, length, at) = _tag(data, at), _length(data, at, implicit=True)
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM:
            raise _NotPlain
        at = _end_of_item(data, at, implicit, depth) if length == _UNDEFINED else at + length


def _end_of_item(data: bytes, at: int, implicit: bool, depth: int) -> int:
    while True:
        if _tag(data, at) == _ITEM_END:
            return at + 8
        vr, length, start = _length(data, at, implicit)
        if length == _UNDEFINED and vr not in (b"", b"SQ"):
            raise _NotPlain
        at = _end_of_sequence(data, start, implicit, depth + 1) if length == _UNDEFINED else start + length
