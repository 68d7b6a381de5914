"""JSON documents, sealed: read with one error for whatever is none of ours, was cut short or altered since.

A seal is a field of the document: the crc32c of all others. `sealed` records are of a store, and checked byte for byte;
`write_json` writes files for people and programs, of which every value is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c

from maesil.errors import DamagedError
from maesil.files import write_whole

CHECKSUM = "checksum_crc32c"
"""The field by which a document checks itself."""


def parsed_json(data: bytes | str) -> Any:
    """Return what JSON says; ValueError for what is none, and for what is nested too deeply to be of ours."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except json.JSONDecodeError as error:
        where = f"from line {error.lineno} on" if error.doc.strip() else "but an empty file"
        raise ValueError(f"it is no JSON {where}") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is no text in UTF-8") from error


def reason(error: Exception) -> str:
    """Return in words why a document is not what was expected: Python's own texts speak of its types."""
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    if isinstance(error, TypeError | AttributeError):
        return "a field holds another kind of value"
    return str(error)


def canonical_json(document: Any) -> bytes:
    """Return JSON with sorted keys, no spaces and no NaN: equal values give equal bytes (after RFC 8785)."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sealed(document: dict[str, Any]) -> bytes:
    """Return a record as canonical JSON with its own crc32c in it."""
    return canonical_json({**document, CHECKSUM: google_crc32c.value(canonical_json(document))})


def unsealed(data: bytes) -> dict[str, Any]:
    """Return the record that `sealed` wrote; ValueError unless every byte is as it was written."""
    document = _parsed_object(data)
    document.pop(CHECKSUM, None)
    # Byte for byte: 1e-5 and 1E-5 are the same number, but only one of them was written.
    if sealed(document) != data:
        raise ValueError("it does not match its own checksum; it was altered")
    return document


def as_json(document: Any) -> Any:
    """Return plain values as they are once written as JSON and read again: lists for tuples, texts as keys."""
    return json.loads(json.dumps(document))


def write_json(path: Path, document: dict[str, Any], *, private: bool = False, allow_nan: bool = False) -> None:
    """Write or replace a JSON file with its seal, all at once; ``private`` as of `maesil.files.whole_file`.

    ValueError for infinite numbers and for those that are none, unless ``allow_nan``: only Python reads them.
    """
    text = json.dumps({**document, CHECKSUM: _seal(document)}, indent=1, allow_nan=allow_nan)
    write_whole(path, text + "\n", private=private)


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` wrote, without its seal; a file of an earlier version, which has none, is believed.

    DamagedError if it was cut short or altered; OSError if it cannot be read.
    """
    data = path.read_bytes()
    with fields_of(path):
        document = _parsed_object(data)
        if CHECKSUM in document and document.pop(CHECKSUM) != _seal(document):
            raise ValueError(f"its {CHECKSUM} is of other values (take that field out if you changed it)")
    return document


@contextmanager
def fields_of(path: Path) -> Iterator[None]:
    """Say in one line (DamagedError) what is wrong with the fields that the block takes from a document."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"expected a file as maesil wrote it, found it damaged: {reason(error)}"
        raise DamagedError(f"{path}: {told}; restore it, or remove it and have it written anew") from error


def _parsed_object(data: bytes) -> dict[str, Any]:
    document = parsed_json(data)
    if not isinstance(document, dict):
        raise ValueError("expected a JSON object")
    return document


def _seal(document: dict[str, Any]) -> int:
    # Of the values as they are read again, some of which (of inner files) are no numbers.
    text = json.dumps(as_json(document), sort_keys=True, separators=(",", ":"))
    return int(google_crc32c.value(text.encode()))
