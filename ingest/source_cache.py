"""What this machine remembers of sources it has read, so that a second run need not read them again.

Keyed by HMAC of path, size and modification time (of an object: ETag) of all files of a volume; holds hashes only.
Losing it costs time, never correctness; it lives in the user's cache folder, outside every store.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from maesil.errors import Refused
from maesil.ingest.privacy import IdentityKey
from maesil.ingest.source_file import file_on_disk, stamp_of
from maesil.ingest.source_path import SourcePath


class SourceCache:
    """Source hashes by what the file system says of the files. A cache that cannot be opened is just empty."""

    def __init__(self, key: IdentityKey, folder: Path | None = None) -> None:
        self._key = key
        folder = folder or Path(platformdirs.user_cache_dir("maesil"))
        self._database: sqlite3.Connection | None = None
        with contextlib.suppress(OSError, sqlite3.Error):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            database = sqlite3.connect(folder / "sources.sqlite", timeout=5, isolation_level=None)
            database.execute("PRAGMA synchronous = OFF")  # what a power cut takes is read again
            database.execute("CREATE TABLE IF NOT EXISTS sources (files TEXT PRIMARY KEY, source_hash TEXT NOT NULL)")
            self._database = database

    def files(self, paths: Sequence[SourcePath], *more: object) -> str:
        """Return what the file system says of files now, hashed; to be asked before they are read. Empty if gone.

        ``more`` is whatever else decides what is read of them.
        """
        try:
            on_disk = [file_on_disk(path) for path in paths]
            stats = [(str(path.absolute()), *stamp_of(path)) for path in dict.fromkeys(on_disk)]
        except (OSError, Refused):
            return ""
        members = [str(path) for path in paths] if on_disk != list(paths) else []
        return self._key.hash("files", json.dumps([stats, members, repr(more)]))

    def get(self, files: str) -> str | None:
        """Return the source hash that these very files had, or None."""
        if self._database is None or not files:
            return None
        with contextlib.suppress(sqlite3.Error):
            found = self._database.execute("SELECT source_hash FROM sources WHERE files = ?", (files,)).fetchone()
            return str(found[0]) if found else None
        return None

    def put(self, files: str, source_hash: str) -> None:
        """Remember the source hash of files, as they were when `files` was asked."""
        if self._database is None or not files:
            return
        with contextlib.suppress(sqlite3.Error):
            self._database.execute("INSERT OR REPLACE INTO sources VALUES (?, ?)", (files, source_hash))

    def close(self) -> None:
        """Close the database."""
        if self._database is not None:
            self._database.close()
