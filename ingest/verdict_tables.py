"""The verdicts of a run on a disk: a sequence that grows there, and can be brought down to one for each file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from maesil.ingest.source_path import SourcePath
from maesil.ingest.tables import path_bytes, path_digest, path_of, private_tables, text_bytes, text_of
from maesil.ingest.verdict import STATUSES, FileVerdict, Status, one_per_file

_TABLE = """
CREATE TABLE IF NOT EXISTS verdicts (n INTEGER PRIMARY KEY, digest INTEGER, path BLOB, status TEXT, code TEXT,
                                     volume_id TEXT, detail BLOB, more TEXT)
"""
_COLUMNS = "path, status, code, volume_id, detail, more"


class Verdicts(Sequence[FileVerdict]):
    """Verdicts in the order in which they were given; by default in tables of their own."""

    def __init__(self, given: Iterable[FileVerdict] = (), tables: sqlite3.Connection | None = None) -> None:
        self._tables = tables or private_tables()
        self._tables.execute(_TABLE)
        self.extend(given)

    def __len__(self) -> int:
        return int(self._tables.execute("SELECT count(*) FROM verdicts").fetchone()[0])

    def __iter__(self) -> Iterator[FileVerdict]:
        for row in self._tables.execute(f"SELECT {_COLUMNS} FROM verdicts ORDER BY n"):
            yield _verdict(row)

    @overload
    def __getitem__(self, number: int) -> FileVerdict: ...
    @overload
    def __getitem__(self, number: slice) -> list[FileVerdict]: ...
    def __getitem__(self, number: int | slice) -> FileVerdict | list[FileVerdict]:
        if isinstance(number, slice):
            return list(self)[number]
        at = range(len(self))[number]
        wanted = f"SELECT {_COLUMNS} FROM verdicts ORDER BY n LIMIT 1 OFFSET ?"
        return _verdict(self._tables.execute(wanted, (at,)).fetchone())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def append(self, verdict: FileVerdict) -> None:
        """Add a verdict."""
        self.extend([verdict])

    def extend(self, verdicts: Iterable[FileVerdict]) -> None:
        """Add verdicts."""
        self._tables.executemany(
            f"INSERT INTO verdicts (digest, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", map(_row, verdicts)
        )

    def tally(self) -> dict[tuple[str, str], tuple[int, FileVerdict]]:
        """Return for each status and code how many verdicts there are, and the first of them."""
        wanted = "SELECT status, code, count(*), min(n) FROM verdicts GROUP BY status, code"
        return {(s, c): (count, self._at(n)) for s, c, count, n in self._tables.execute(wanted).fetchall()}

    def ordered_tally(self) -> list[tuple[Status, str, int, FileVerdict]]:
        """Return the same as rows of status, code, count and first verdict, in the order in which tables show them."""
        rows = [(first.status, code, count, first) for (_, code), (count, first) in self.tally().items()]
        return sorted(rows, key=lambda row: (STATUSES.index(row[0]), row[1]))

    def counts(self) -> dict[str, int]:
        """Return how many files met each verdict; sums to the files found once there is one for each (`settle`)."""
        found: dict[str, int] = dict.fromkeys(STATUSES, 0)
        for (status, _), (count, _) in self.tally().items():
            found[status] += count
        return found

    def of_status(self, status: str) -> Iterator[FileVerdict]:
        """Yield the verdicts of one status."""
        for row in self._tables.execute(f"SELECT {_COLUMNS} FROM verdicts WHERE status = ? ORDER BY n", (status,)):
            yield _verdict(row)

    def settle(self) -> None:
        """Bring several verdicts on one file down to one; see `maesil.ingest.verdict.one_per_file`."""
        self._tables.execute("CREATE INDEX IF NOT EXISTS verdicts_by_path ON verdicts (digest, n)")
        several = "SELECT digest FROM verdicts GROUP BY digest HAVING count(*) > 1"
        for (digest,) in self._tables.execute(several).fetchall():
            rows = self._tables.execute(
                f"SELECT n, {_COLUMNS} FROM verdicts WHERE digest = ? ORDER BY n", (digest,)
            ).fetchall()
            by_path: dict[bytes, list[Any]] = {}
            for n, *row in rows:
                by_path.setdefault(row[0], []).append((n, _verdict(row)))
            for same in by_path.values():
                self._settle(same)

    def _settle(self, same: list[tuple[int, FileVerdict]]) -> None:
        (best,) = one_per_file([verdict for _, verdict in same])
        self._tables.executemany("DELETE FROM verdicts WHERE n = ?", [(n,) for n, _ in same])
        sql = f"INSERT INTO verdicts (n, digest, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        self._tables.execute(sql, (same[0][0], *_row(best)))

    def are_one_for_each(self, expected: Iterable[SourcePath]) -> bool:
        """Return whether there is exactly one verdict on each of these files, which may be named several times."""
        self._tables.execute("CREATE TEMP TABLE expected (digest INTEGER)")
        rows = ((path_digest(path),) for path in expected)
        self._tables.executemany("INSERT INTO expected VALUES (?)", rows)
        (wanted,) = self._tables.execute("SELECT count(DISTINCT digest) FROM expected").fetchone()
        missing = "SELECT digest FROM expected EXCEPT SELECT digest FROM verdicts"
        (lost,) = self._tables.execute(f"SELECT count(*) FROM ({missing})").fetchone()
        self._tables.execute("DROP TABLE expected")
        return bool(lost == 0 and wanted == len(self))

    def _at(self, n: int) -> FileVerdict:
        return _verdict(self._tables.execute(f"SELECT {_COLUMNS} FROM verdicts WHERE n = ?", (n,)).fetchone())


def _row(verdict: FileVerdict) -> tuple[Any, ...]:
    more = json.dumps(verdict.more_volumes) if verdict.more_volumes else ""
    path, detail = path_bytes(verdict.path), text_bytes(verdict.detail)
    return path_digest(verdict.path), path, verdict.status, verdict.code, verdict.volume_id, detail, more


def _verdict(row: Sequence[Any]) -> FileVerdict:
    path, status, code, volume_id, detail, more = row
    return FileVerdict(path_of(path), status, code, volume_id, text_of(detail), tuple(json.loads(more or "[]")))
