"""Tables on a disk for what an ingest would else hold in memory: SQLite, and how paths and texts are written in it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maesil.errors import ResourceError
from maesil.ingest.source_path import ObjectFile, SourcePath

_CACHE_KIB = 32768
_PAGE = 256
_FULL = ("full", "disk I/O error")


def private_tables() -> sqlite3.Connection:
    """Return tables of this process alone: SQLite keeps them in a file without a name, in TMPDIR or /var/tmp."""
    tables = sqlite3.connect("", isolation_level=None, uri=True, check_same_thread=False)
    for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}", "temp_store = FILE"):
        tables.execute(f"PRAGMA {pragma}")
    return tables


@contextmanager
def room_for_tables() -> Iterator[None]:
    """Have a full disk be said in words: ResourceError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if is_full(error):
            raise ResourceError(
                f"expected room for the tables of the scan (about 1 kB per file), found none ({error}); "
                "set MAESIL_CACHE and TMPDIR to folders with more, and run the same command again"
            ) from error
        raise


def is_full(error: Exception) -> bool:
    """Return whether SQLite failed for want of room, or because the disk fails."""
    return isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in _FULL)


def text_bytes(text: str) -> bytes:
    """Return a text of any letters, lone surrogates too, as bytes that sort as the text does."""
    return text.encode("utf-8", "surrogatepass")


def text_of(data: bytes) -> str:
    """Return the text that `text_bytes` was given."""
    return data.decode("utf-8", "surrogatepass")


def path_bytes(path: SourcePath) -> bytes:
    """Return a path, or an object with all that is known of it, as bytes."""
    if isinstance(path, Path):
        return text_bytes(str(path))
    return b"\0" + json.dumps(_object(path)).encode()


def path_of(data: bytes) -> SourcePath:
    """Return the path that `path_bytes` was given."""
    return _object_of(json.loads(data[1:])) if data[:1] == b"\0" else Path(text_of(data))


def path_digest(path: SourcePath) -> int:
    """Return 64 bits of a hash of a path; of an object its name alone counts."""
    return int.from_bytes(hashlib.blake2b(text_bytes(str(path)), digest_size=8).digest(), "big", signed=True)


def _object(file: ObjectFile) -> list[Any]:
    archive = None if file.archive is None else _object(file.archive)
    return [file.scheme, file.bucket, file.folder, file.size, file.stamp, archive]


def _object_of(values: list[Any]) -> ObjectFile:
    scheme, bucket, folder, size, stamp, archive = values
    return ObjectFile(scheme, bucket, folder, size, stamp, None if archive is None else _object_of(archive))


def paged(tables: sqlite3.Connection, sql: str, *values: object) -> Iterator[tuple[Any, ...]]:
    """Yield rows by their first column; ``sql`` ends in conditions and asks first for ``n > ?``.

    They are read a page at a time, so that rows may be changed meanwhile.
    """
    last = -1
    while True:
        page = tables.execute(f"{sql} ORDER BY n LIMIT {_PAGE}", (last, *values)).fetchall()
        yield from page
        if len(page) < _PAGE:
            return
        last = page[-1][0]
