"""What a scan finds, on a disk: files in the order in which they were listed, their headers, and verdicts.

The tables stand in a schema of their own, ``scan``, so that a run reads those of another process beside its own.
All that was read of a file goes in as one transaction. So a killed scan leaves whole files, and the next goes on there.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple

from maesil.ingest.failures import MAY_PASS
from maesil.ingest.header import InstanceHeader
from maesil.ingest.header_rows import kind_of, packed, rows_of
from maesil.ingest.scan import ScanResult
from maesil.ingest.source_path import ObjectFile, SourcePath
from maesil.ingest.tables import paged, path_bytes, path_of, text_bytes

STEP = 1 << 24
"""Numbers of listed files lie so far apart; members of an archive take those between."""
_FILES_A_TRANSACTION = 500
_REMEMBERED = 1 << 14
_TABLES = """
CREATE TABLE IF NOT EXISTS scan.about (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS scan.files (n INTEGER PRIMARY KEY, path BLOB, stamp TEXT, state INTEGER);
CREATE TABLE IF NOT EXISTS scan.keys (id INTEGER PRIMARY KEY, patient BLOB, study BLOB, series BLOB,
                                      UNIQUE (patient, study, series));
CREATE TABLE IF NOT EXISTS scan.shared (id INTEGER PRIMARY KEY, row BLOB, kind BLOB);
CREATE TABLE IF NOT EXISTS scan.said (id INTEGER PRIMARY KEY, row BLOB);
CREATE TABLE IF NOT EXISTS scan.headers (listed INTEGER, seq INTEGER, file INTEGER, key INTEGER, shared INTEGER,
                                         said INTEGER, row BLOB, PRIMARY KEY (listed, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scan.others (listed INTEGER, seq INTEGER, file INTEGER, row BLOB,
                                        PRIMARY KEY (listed, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scan.niftis (listed INTEGER, seq INTEGER, file INTEGER, row BLOB,
                                        PRIMARY KEY (listed, seq)) WITHOUT ROWID;
"""
_INDICES = """
CREATE INDEX IF NOT EXISTS scan.headers_by_key ON headers (key, listed, seq);
CREATE INDEX IF NOT EXISTS scan.keys_by_series ON keys (series, id);
"""
_CONTENTS = ("headers", "others", "niftis")
_LISTED, _LOOKED_AT, _MAY_PASS, _MEMBER = range(4)


def stamp_text(path: SourcePath, *, follow_links: bool) -> str:
    """Return by what a change of a listed file is seen: size, times and kind; of an object its ETag. Empty if gone."""
    if isinstance(path, ObjectFile):
        return f"{path.size} {path.stamp}"
    try:
        found = path.stat(follow_symlinks=follow_links)
    except OSError:
        return ""
    return f"{found.st_mode} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


class ScanTables:
    """The tables of a scan in schema ``scan`` of a connection."""

    def __init__(self, tables: sqlite3.Connection) -> None:
        self.tables = tables
        self._known: dict[bytes, int] = {}
        """Numbers of rows that many slices share, of those met last."""

    def create(self) -> None:
        """Make the tables where there are none."""
        self.tables.executescript(_TABLES)

    # Listing ----------------------------------------------------------------------------------------

    def list_files(self, files: Iterable[SourcePath], *, follow_links: bool) -> Iterator[SourcePath]:
        """Write down all files of a walk, and yield each; what is known of those that did not change is kept.

        Where another file is met than the last time, all behind it is dropped, and looked at anew.
        """
        known: Iterator[tuple[int, bytes, str, int]] | None = self._listed()
        with self.in_transactions() as done_with_one:
            for number, path in enumerate(files, start=1):
                n, data, stamp = number * STEP, path_bytes(path), stamp_text(path, follow_links=follow_links)
                place = next(known, None) if known is not None else None
                if place is None or place[1] != data:
                    if place is not None:
                        self._drop_from(n)
                    known = None
                    self._execute("INSERT INTO scan.files VALUES (?, ?, ?, ?)", n, data, stamp, _LISTED)
                elif place[2] != stamp or not stamp or place[3] == _MAY_PASS:
                    self._forget(n, stamp)
                done_with_one()
                yield path
            place = next(known, None) if known is not None else None
            if place is not None:
                self._drop_from(place[0])

    def is_as_listed(self, files: Iterable[SourcePath], *, follow_links: bool) -> bool:
        """Return whether a walk meets these very files, all of them looked at, and none changed."""
        known = self._listed()
        for path in files:
            place = next(known, None)
            stamp = stamp_text(path, follow_links=follow_links)
            if place is None or place[1:] != (path_bytes(path), stamp, _LOOKED_AT) or not stamp:
                return False
        return next(known, None) is None

    def _listed(self) -> Iterator[tuple[int, bytes, str, int]]:
        """Yield the rows of listed files, read in pages: they may be changed meanwhile."""
        return paged(self.tables, f"SELECT n, path, stamp, state FROM scan.files WHERE n > ? AND n % {STEP} = 0")

    def _forget(self, n: int, stamp: str) -> None:
        """Drop what is known of one listed file, which is to be looked at anew."""
        self._execute("DELETE FROM scan.files WHERE n > ? AND n < ?", n, n + STEP)
        for table in _CONTENTS:
            self._execute(f"DELETE FROM scan.{table} WHERE listed = ?", n)
        self._execute("UPDATE scan.files SET stamp = ?, state = ? WHERE n = ?", stamp, _LISTED, n)

    def forget_what_may_pass(self) -> int:
        """Drop what is known of the files that could not be read, and may be another time; return how many."""
        wanted = f"SELECT n, stamp FROM scan.files WHERE state = {_MAY_PASS}"
        doomed = self.tables.execute(wanted).fetchall()
        with self.in_transactions() as done_with_one:
            for n, stamp in doomed:
                self._forget(n, stamp)
                done_with_one()
        return len(doomed)

    def _drop_from(self, n: int) -> None:
        self._execute("DELETE FROM scan.files WHERE n >= ?", n)
        for table in _CONTENTS:
            self._execute(f"DELETE FROM scan.{table} WHERE listed >= ?", n)

    def listed(self) -> int:
        """Return how many files were listed."""
        return int(self.tables.execute(f"SELECT count(*) FROM scan.files WHERE n % {STEP} = 0").fetchone()[0])

    def to_be_looked_at(self) -> int:
        """Return how many of them were not looked at yet."""
        return int(self.tables.execute(f"SELECT count(*) FROM scan.files WHERE state = {_LISTED}").fetchone()[0])

    # Looking ----------------------------------------------------------------------------------------

    def to_look_at(self) -> Iterator[tuple[int, SourcePath]]:
        """Yield the listed files that were not looked at yet, with their numbers."""
        wanted = f"SELECT n, path FROM scan.files WHERE n > ? AND state = {_LISTED}"
        for n, data in paged(self.tables, wanted):
            yield n, path_of(data)

    def put(self, n: int, listed: SourcePath, found: ScanResult) -> None:
        """Write what a listed file is: its headers, or verdicts; of an archive those of its members."""
        numbers = {listed: n}

        def number_of(path: SourcePath) -> int:
            if path not in numbers:
                numbers[path] = n + len(numbers)
                self._execute("INSERT INTO scan.files VALUES (?, ?, '', ?)", numbers[path], path_bytes(path), _MEMBER)
            return numbers[path]

        for seq, header in enumerate(found.instances):
            self._put_header(n, seq, number_of(header.path), header)
        for seq, path in enumerate(found.niftis):
            row = packed(astuple(found.claims[path]))
            self._execute("INSERT INTO scan.niftis VALUES (?, ?, ?, ?)", n, seq, number_of(path), row)
        for seq, verdict in enumerate(found.verdicts):
            row = packed([verdict.status, verdict.code, verdict.detail])
            self._execute("INSERT INTO scan.others VALUES (?, ?, ?, ?)", n, seq, number_of(verdict.path), row)
        passing = any(verdict.code in MAY_PASS for verdict in found.verdicts)
        self._execute("UPDATE scan.files SET state = ? WHERE n = ?", _MAY_PASS if passing else _LOOKED_AT, n)

    def _put_header(self, n: int, seq: int, file: int, header: InstanceHeader) -> None:
        rows = rows_of(header)
        key = tuple(map(text_bytes, rows.key))
        key_id = self._id(b"\0".join((b"key", *key)), "keys", "patient, study, series", *key)
        shared_id = self._id(b"s" + rows.shared, "shared", "row, kind", rows.shared, text_bytes(kind_of(header)))
        said_id = self._id(b"m" + rows.said, "said", "row", rows.said)
        values = (n, seq, file, key_id, shared_id, said_id, rows.own)
        self.tables.execute("INSERT INTO scan.headers VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def _id(self, name: bytes, table: str, columns: str, *values: bytes) -> int:
        """Return the number of a row that others may share; it may be written twice, but for a key."""
        if name in self._known:
            return self._known[name]
        marks = ", ".join("?" * len(values))
        done = self.tables.execute(f"INSERT OR IGNORE INTO scan.{table} ({columns}) VALUES ({marks})", values)
        found = done.lastrowid if done.rowcount else None
        if found is None:
            where = "patient = ? AND study = ? AND series = ?"
            found = self.tables.execute(f"SELECT id FROM scan.keys WHERE {where}", values).fetchone()[0]
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[name] = int(found)
        return int(found)

    @contextmanager
    def in_transactions(self) -> Iterator[Callable[[], None]]:
        """Have what is written in the block reach the disk, some hundred files at a time; yield what counts them."""
        count = 0

        def one_more() -> None:
            nonlocal count
            count += 1
            if count % _FILES_A_TRANSACTION == 0:
                self.tables.execute("COMMIT")
                self.tables.execute("BEGIN")

        self.tables.execute("BEGIN")
        try:
            yield one_more
        except BaseException:
            self.tables.execute("ROLLBACK")
            self._known.clear()
            raise
        self.tables.execute("COMMIT")

    def _execute(self, sql: str, *values: object) -> None:
        self.tables.execute(sql, values)

    def finish(self) -> None:
        """Make the tables ready to be asked."""
        self.tables.executescript(_INDICES)
