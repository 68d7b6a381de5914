"""A plan on a disk: what becomes of each part of each series, and how far a run has come with each volume.

The tables are private to a process (`maesil.ingest.tables.private_tables`), so plans lie in them as Python's own bytes.
"""

from __future__ import annotations

import pickle
import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from maesil.ingest.plan import LeftOut, RefusedSeries, VolumePlan, decided_on, of_one_patient, volumes_of_nifti
from maesil.ingest.reunite import Key, Planned, is_too_little, outcomes_of_all
from maesil.ingest.scan_read import HeadersOnDisk, OtherFiles, niftis_of
from maesil.ingest.siblings import Siblings, stand_ins
from maesil.ingest.stack import Outcome, SeriesRules
from maesil.ingest.tables import paged, text_bytes
from maesil.ingest.verdict import FileVerdict
from maesil.ingest.volume import task_bytes
from maesil.progress import Report

One = TypeVar("One")

_TABLE = """
CREATE TABLE outcomes (n INTEGER PRIMARY KEY, patient BLOB, study BLOB, series BLOB, too_little INTEGER, kind TEXT,
    body BLOB, bytes INTEGER, state TEXT DEFAULT 'planned', volume_id TEXT, source_hash TEXT, files TEXT);
CREATE INDEX outcomes_by_key ON outcomes (patient, study, series);
CREATE INDEX outcomes_by_state ON outcomes (state, n);
CREATE INDEX outcomes_by_id ON outcomes (volume_id, n);
"""
VOLUME, REFUSED, NOT_WANTED = "volume", "refused", "not wanted"
PLANNED, OTHERS, TO_HASH, HASHED, STALE, SETTLED = "planned", "others", "to hash", "hashed", "stale", "settled"
"""States of a volume: as planned, another part's, to be read for its hash, with an id, to be built, dealt with."""


@dataclass(frozen=True)
class Item:
    """A planned volume, its number in the table, and what is known of it by now."""

    n: int
    plan: VolumePlan
    volume_id: str
    """Empty until its identity is known."""
    source_hash: str
    """Empty where nothing depends on it yet: it is then made while the voxels are read."""
    files: str
    """What the file system said of the source before it was read."""


class PlanOnDisk(Planned):
    """The plan of a scan in tables of the same connection; see `maesil.ingest.plan.AnyPlan`."""

    def __init__(self, tables: sqlite3.Connection, rules: SeriesRules | None) -> None:
        super().__init__()
        self.tables = tables
        self._rules = rules
        self.other_files = OtherFiles(tables)
        self._beside: Siblings = stand_ins(self.other_files)
        tables.executescript(_TABLE)

    # Planning ---------------------------------------------------------------------------------------

    def make(self, prefer_form: str, progress: Report) -> None:
        """Plan everything that the scan found."""
        done = 0

        def on_series() -> None:
            nonlocal done
            done += 1
            progress("plan", done, total)

        headers = HeadersOnDisk(self.tables, on_series)
        total = headers.series_uids()
        outcomes_of_all(headers, self._rules, self)
        headers.require_all_given()
        for path, claim in niftis_of(self.tables):
            for volume in volumes_of_nifti(path, claim, prefer_form):
                self._insert(("", "", ""), False, volume)

    def add(self, key: Key, outcomes: Iterable[Outcome]) -> None:
        """See `Planned.add`."""
        for outcome in outcomes:
            self._insert(key, is_too_little(outcome), decided_on(key, outcome, self._beside, self._rules))

    def drop(self, keys: Collection[Key]) -> None:
        """See `Planned.drop`."""
        sql = "DELETE FROM outcomes WHERE patient = ? AND study = ? AND series = ?"
        self.tables.executemany(sql, [tuple(map(text_bytes, key)) for key in keys])

    def _insert(self, key: Key, too_little: bool, decided: VolumePlan | LeftOut) -> None:
        if isinstance(decided, VolumePlan):
            kind, size = VOLUME, task_bytes(decided.source)
        else:
            kind, size = NOT_WANTED if decided.identity is None else REFUSED, 0
        body = zlib.compress(pickle.dumps(decided, pickle.HIGHEST_PROTOCOL), 1)
        values = (*map(text_bytes, key), too_little, kind, body, size)
        sql = (
            "INSERT INTO outcomes (patient, study, series, too_little, kind, body, bytes) VALUES (?, ?, ?, ?, ?, ?, ?)"
        )
        self.tables.execute(sql, values)

    # What was planned -------------------------------------------------------------------------------

    @property
    def volumes(self) -> Collection[VolumePlan]:
        """One plan for each volume."""
        return _Found(lambda: self._count("kind = 'volume'"), lambda: (item.plan for item in self.items()))

    @property
    def refused(self) -> Collection[RefusedSeries]:
        """What the store's quarantine is told."""
        return _Found(
            lambda: self._count("kind = 'refused'"),
            lambda: (found for left in self.left_out() if (found := left.refused()) is not None),
        )

    @property
    def verdicts(self) -> Collection[FileVerdict]:
        """Verdicts on files that are no part of a volume."""
        return _Found(lambda: sum(1 for _ in self._verdicts()), self._verdicts)

    @property
    def damaged_files(self) -> int:
        """Refused before it was known which series they belong to."""
        return sum(verdict.status == "quarantined" for verdict in self.other_files)

    @property
    def largest_task(self) -> int:
        """Memory (bytes) that the largest volume takes while it is made; 0 where there is none."""
        return int(self.tables.execute("SELECT coalesce(max(bytes), 0) FROM outcomes").fetchone()[0])

    def _verdicts(self) -> Iterator[FileVerdict]:
        yield from self.other_files
        for left in self.left_out():
            yield from left.verdicts()

    def left_out(self) -> Iterator[LeftOut]:
        """Yield the parts of series that will not become volumes."""
        for _, body in paged(self.tables, "SELECT n, body FROM outcomes WHERE n > ? AND kind <> 'volume'"):
            yield _thawed(body)

    def _count(self, which: str) -> int:
        return int(self.tables.execute(f"SELECT count(*) FROM outcomes WHERE {which}").fetchone()[0])

    # How far a run has come -------------------------------------------------------------------------

    def items(self, state: str | None = None) -> Iterator[Item]:
        """Yield the planned volumes in order, those of one state or all; states may be changed meanwhile."""
        sql = "SELECT n, body, volume_id, source_hash, files FROM outcomes WHERE n > ? AND kind = 'volume'"
        found = paged(self.tables, f"{sql} AND state = ?", state) if state else paged(self.tables, sql)
        for n, body, volume_id, source_hash, files in found:
            yield Item(n, of_one_patient(_thawed(body), self.patients), volume_id or "", source_hash or "", files or "")

    def count(self, state: str) -> int:
        """Return how many volumes are in a state."""
        return self._count(f"kind = 'volume' AND state = '{state}'")

    def note(self, n: int, state: str, **known: str) -> None:
        """Note the state of a volume, and what became known of it."""
        columns = ", ".join(f"{name} = ?" for name in ("state", *known))
        self.tables.execute(f"UPDATE outcomes SET {columns} WHERE n = ?", (state, *known.values(), n))

    def is_first(self, item: Item) -> bool:
        """Return whether no volume before this one has its id."""
        sql = "SELECT min(n) FROM outcomes WHERE volume_id = ?"
        return bool(self.tables.execute(sql, (item.volume_id,)).fetchone()[0] == item.n)


class _Found(Collection[One], Generic[One]):
    """Things that are read from tables whenever they are asked for."""

    def __init__(self, count: Callable[[], int], read: Callable[[], Iterator[One]]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count()

    def __iter__(self) -> Iterator[One]:
        return self._read()

    def __contains__(self, one: object) -> bool:
        return any(one == other for other in self)


def _thawed(body: bytes) -> Any:
    return pickle.loads(zlib.decompress(body))
