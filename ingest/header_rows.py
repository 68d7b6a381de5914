"""Headers as rows: what many slices share is written once, and each slice adds little."""

from __future__ import annotations

import functools
import json
import zlib
from dataclasses import dataclass, fields
from typing import Any

from maesil.ingest.header import InstanceHeader
from maesil.ingest.source_path import SourcePath

_KEY = ("patient", "study", "series")
_OWN = ("frame", "position", "slice_location")
_SAID = ("acquisition", "weak")
_PLAIN = tuple(f.name for f in fields(InstanceHeader) if f.name not in (*_KEY, *_OWN, *_SAID, "path", "technical"))
_SHARED = ("technical", *_PLAIN)
_TUPLES = ("image_type", "orientation", "pixel_spacing", "remarks", "position")


class DamagedRow(ValueError):
    """A row whose checksum does not fit: the database was damaged."""


@dataclass(frozen=True)
class Rows:
    """A header as rows: whose it is, what it has of its own, what tells passes apart, and all else."""

    key: tuple[str, str, str]
    own: bytes
    said: bytes
    shared: bytes


def rows_of(header: InstanceHeader) -> Rows:
    """Return a header as rows; the row of its own holds a checksum of the others."""
    key = (header.patient, header.study, header.series)
    said = _said_row(header.acquisition, header.weak)
    shared = _shared_row(tuple(header.technical.items()), *(getattr(header, name) for name in _PLAIN))
    own = packed([*(getattr(header, name) for name in _OWN), _sum(key, said, shared)])
    return Rows(key, own, said, shared)


@functools.lru_cache(maxsize=4096)
def _said_row(*values: tuple[str, ...]) -> bytes:
    return packed(values)


@functools.lru_cache(maxsize=4096)
def _shared_row(technical: tuple[tuple[str, Any], ...], *values: Any) -> bytes:
    return packed([dict(technical), *values])


def kind_of(header: InstanceHeader) -> str:
    """Return kind of image and scanner as a text: single slices that belong together agree in it."""
    return _kind(header.image_type, tuple(header.technical.items()))


@functools.lru_cache(maxsize=4096)
def _kind(image_type: tuple[str, ...], technical: tuple[tuple[str, Any], ...]) -> str:
    return str((image_type, tuple(sorted((name, str(value)) for name, value in technical))))


def header_of(path: SourcePath, rows: Rows) -> InstanceHeader:
    """Return the header that was written; `DamagedRow` if one of its rows was damaged."""
    *own, total = unpacked(rows.own)
    if total != _sum(rows.key, rows.said, rows.shared):
        raise DamagedRow("expected the rows that belong to a header, found others")
    values: dict[str, Any] = dict(zip(_OWN, own, strict=True))
    values["position"] = None if values["position"] is None else tuple(values["position"])
    patient, study, series = rows.key
    acquisition, weak = _said_of(rows.said)
    return InstanceHeader(
        path=path, patient=patient, study=study, series=series, acquisition=acquisition, weak=weak, **values,
        **_shared_of(rows.shared),
    )  # fmt: skip


def _sum(key: tuple[str, ...], *rows: bytes) -> int:
    total = zlib.crc32("\0".join(key).encode("utf-8", "surrogatepass"))
    for row in rows:
        total = zlib.crc32(row, total)
    return total


@functools.lru_cache(maxsize=4096)
def _said_of(data: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    acquisition, weak = unpacked(data)
    return tuple(acquisition), tuple(weak)


@functools.lru_cache(maxsize=4096)
def _shared_of(data: bytes) -> dict[str, Any]:
    values = dict(zip(_SHARED, unpacked(data), strict=True))
    return {name: tuple(v) if name in _TUPLES and v is not None else v for name, v in values.items()}


def packed(values: Any) -> bytes:
    """Return JSON-ready values as bytes with a checksum before them."""
    data = json.dumps(values, separators=(",", ":")).encode()
    return zlib.crc32(data).to_bytes(4, "big") + data


def unpacked(data: bytes) -> Any:
    """Return the values that `packed` was given; `DamagedRow` if the checksum does not fit."""
    if zlib.crc32(data[4:]) != int.from_bytes(data[:4], "big"):
        raise DamagedRow("expected rows of headers as they were written, found others")
    return json.loads(data[4:])
