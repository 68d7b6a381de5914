"""One scan for all who ingest the same sources: made by one process, gone on with after a kill, read by the others.

The tables lie in the cache folder while they are needed, readable by their owner alone: they hold what headers say of
patients. One process at a time writes them, under a lock, as ``NAME.part``; finished ones get their name by a rename
and are never written again, so that others read them without any lock of SQLite's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import platformdirs

from maesil.errors import ResourceError
from maesil.ingest.header_rows import DamagedRow
from maesil.ingest.objects import with_heads
from maesil.ingest.options import IngestOptions
from maesil.ingest.scan import ScanResult, find_files, look_at_listed
from maesil.ingest.scan_tables import ScanTables
from maesil.ingest.source_path import SourcePath, SourcePlace
from maesil.ingest.tables import private_tables
from maesil.locks import holder_of, locked
from maesil.progress import Report
from maesil.text import counted
from maesil.version import __version__

Say = Callable[[str], None]
DAMAGED_ROWS = (sqlite3.DatabaseError, DamagedRow)
"""What a damaged file of tables makes of a question."""
_DAMAGED = (*DAMAGED_ROWS, ValueError)
_FOLDER = "scans"
_KEPT_SECONDS = 7 * 24 * 3600
_FORMAT = 2
_WORTH_TELLING = 1000
"""Files of a scan whose state is told. Fewer are read in a moment."""


@dataclass(frozen=True)
class SharedScan:
    """Where the scan of some sources lies, and how it is made."""

    sources: tuple[SourcePlace, ...]
    options: IngestOptions
    progress: Report
    say: Say

    @property
    def folder(self) -> Path:
        """Where all scans of a user lie."""
        return (self.options.cache_folder or Path(platformdirs.user_cache_dir("maesil"))) / _FOLDER

    @functools.cached_property
    def _real(self) -> Path:
        return self.folder.resolve()

    @property
    def name(self) -> str:
        """A name that says nothing: a hash of the sources and of how they are walked."""
        told = [_FORMAT, __version__, self.options.follow_links, *(str(_absolute(place)) for place in self.sources)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]

    def file(self, suffix: str) -> Path:
        """Return one of the files of this scan."""
        return self.folder / f"{self.name}.{suffix}"

    def tables(self) -> sqlite3.Connection:
        """Return private tables that have the finished scan beside them as schema ``scan``."""
        tables = private_tables()
        try:
            if not self.options.dry_run:
                with self._alone():
                    self._make(tables)
                return tables
        except _NoPlaceError as error:
            self.say(f"the scan is not kept for a restart or for others: {error}")
        tables.execute("ATTACH '' AS scan")  # a file without a name: a dry run leaves nothing anywhere
        self._look(ScanTables(tables))
        return tables

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the one process that scans these sources; `_NoPlaceError` where nothing can be kept."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _remove_what_is_old(self.folder)
            lock = locked(self.file("lock"), lambda who: self.say(f"the sources are being scanned by {who}; waiting"))
            lock.__enter__()
        except (OSError, ResourceError) as error:
            raise _NoPlaceError(str(error)) from error
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    # Making -----------------------------------------------------------------------------------------

    def _make(self, tables: sqlite3.Connection) -> None:
        """Attach the finished scan, which is made or brought up to date where it has to be."""
        finished, part = self.file("sqlite"), self.file("part")
        if finished.exists() and self._is_current(tables):
            return
        if finished.exists() and not part.exists():
            shutil.copy(finished, part)
        if part.exists() and not self._is_whole(tables, part):
            self.say("the tables of an earlier scan are damaged: the sources are scanned anew")
            self.discard()
        part.touch(mode=0o600)
        _attach(tables, part, "vfs=unix-none")
        self._look(ScanTables(tables))
        tables.execute("DETACH scan")
        os.replace(part, finished)
        _attach(tables, finished, "immutable=1")

    def _is_current(self, tables: sqlite3.Connection) -> bool:
        """Attach a finished scan and return whether it still tells of what is there; else it is not attached."""
        try:
            _attach(tables, self.file("sqlite"), "immutable=1")
            found = ScanTables(tables)
            if found.is_as_listed(self._files(), follow_links=self.options.follow_links):
                self._tell(found, f"the headers of {counted(found.listed(), 'file')} were read by another run")
                return True
            told = "since another run scanned the sources, files changed or could not be read: they are read again"
            self._tell(found, told)
        except _DAMAGED:
            pass  # said when it is looked at closer
        with suppress(sqlite3.OperationalError):
            tables.execute("DETACH scan")
        return False

    def _is_whole(self, tables: sqlite3.Connection, part: Path) -> bool:
        try:
            _attach(tables, part, "vfs=unix-none")
            try:
                return bool(tables.execute("PRAGMA scan.quick_check(1)").fetchone()[0] == "ok")
            finally:
                tables.execute("DETACH scan")
        except _DAMAGED:
            return False

    def _look(self, found: ScanTables) -> None:
        """List all files, and look at those that were not looked at before."""
        found.create()
        for number, _ in enumerate(found.list_files(self._files(), follow_links=self.options.follow_links), start=1):
            self.progress("list", number, None)
        todo, listed = found.to_be_looked_at(), found.listed()
        if todo < listed:
            told = f"going on with an earlier scan: {listed - todo} of {counted(listed, 'file')} were looked at"
            self._tell(found, told)
        for _ in self._each_looked_at(found):
            todo -= 1
            self.progress("scan", listed - todo, listed)
        if found.forget_what_may_pass():  # a fault of a moment costs no file: after all others they are read again
            for _ in self._each_looked_at(found):
                pass
        found.finish()

    def _each_looked_at(self, found: ScanTables) -> Iterator[SourcePath]:
        """Look at each file that was not looked at before, and yield it."""
        with found.in_transactions() as one_more:
            numbers: list[int] = []
            for path in with_heads(_numbered(found, numbers)):
                result = ScanResult()
                look_at_listed(path, result, follow_links=self.options.follow_links)
                found.put(numbers.pop(0), path, result)
                one_more()
                yield path

    def _tell(self, found: ScanTables, line: str) -> None:
        if found.listed() >= _WORTH_TELLING:
            self.say(line)

    def _files(self) -> Iterator[SourcePath]:
        """Yield all files of the sources but these tables, which change while the cache folder is looked at."""
        for path in find_files(self.sources, follow_links=self.options.follow_links):
            if not (isinstance(path, Path) and path.parent.name == _FOLDER and path.parent.resolve() == self._real):
                yield path

    # Leaving ----------------------------------------------------------------------------------------

    def done(self) -> None:
        """Note that this run has ended well: the scan goes, once all parts of the work have."""
        if self.options.dry_run:
            return
        with suppress(_NoPlaceError), self._alone():
            if self.options.partition is None or self._all_parts_are_done(*self.options.partition):
                self.discard()

    def _all_parts_are_done(self, number: int, count: int) -> bool:
        path = self.file("done")
        parts: set[int] = set()
        with suppress(OSError, ValueError):
            parts = {int(word) for word in path.read_text().split()}
        parts.add(number % count)
        path.write_text(" ".join(map(str, sorted(parts))))
        return len(parts) >= count

    def discard(self) -> None:
        """Remove the tables."""
        for suffix in ("sqlite", "part", "part-journal", "done"):
            self.file(suffix).unlink(missing_ok=True)


class _NoPlaceError(Exception):
    """There is no folder that a scan can be kept in."""


def _numbered(found: ScanTables, numbers: list[int]) -> Iterator[SourcePath]:
    for n, path in found.to_look_at():
        numbers.append(n)
        yield path


def _attach(tables: sqlite3.Connection, file: Path, how: str) -> None:
    tables.execute("ATTACH ? AS scan", (f"file:{quote(str(file.absolute()))}?{how}",))
    tables.execute("PRAGMA scan.cache_size = -32768")
    if "immutable" not in how:
        tables.execute("PRAGMA scan.journal_mode = TRUNCATE")
        tables.execute("PRAGMA scan.synchronous = OFF")  # what a power cut takes is found, and read again


def _absolute(place: SourcePlace) -> SourcePlace:
    return place.absolute() if isinstance(place, Path) else place


def _remove_what_is_old(folder: Path) -> None:
    """Remove what killed runs left a week ago and nobody went on with."""
    for file in folder.iterdir():
        with suppress(OSError):
            old = time.time() - file.stat().st_mtime > _KEPT_SECONDS
            if old and holder_of(file.with_suffix(".lock")) is None:
                file.unlink()
