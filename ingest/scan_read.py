"""What a scan wrote on a disk, read back in parts: never more than one series, study or patient at once."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import groupby

from maesil.ingest.header import InstanceHeader
from maesil.ingest.header_rows import DamagedRow, Rows, header_of, unpacked
from maesil.ingest.nifti import Claim
from maesil.ingest.reunite import SLICES_WITH_A_COPY, Key, Planned
from maesil.ingest.source_path import SourcePath
from maesil.ingest.tables import path_of, text_bytes, text_of
from maesil.ingest.verdict import FileVerdict

_HEADERS = """
SELECT f.path, k.patient, k.study, k.series, h.row, m.row, s.row FROM scan.headers h JOIN scan.files f ON f.n = h.file
JOIN scan.keys k ON k.id = h.key JOIN scan.said m ON m.id = h.said JOIN scan.shared s ON s.id = h.shared
"""
_OTHERS = "FROM scan.others o JOIN scan.files f ON f.n = o.file ORDER BY o.listed, o.seq"


class HeadersOnDisk:
    """The headers of a scan; see `maesil.ingest.reunite.Headers`. ``on_series`` is called after each series UID."""

    def __init__(self, tables: sqlite3.Connection, on_series: Callable[[], None] = lambda: None) -> None:
        self._tables, self._on_series = tables, on_series
        self.given = 0
        """Headers that were given so far, those of single slices not twice."""
        tables.create_function("repr_of", 1, lambda data: text_bytes(repr(text_of(data))), deterministic=True)

    def series_uids(self) -> int:
        """Return how many series UIDs there are."""
        wanted = "SELECT count(DISTINCT series) FROM scan.keys WHERE series <> x''"
        return int(self._tables.execute(wanted).fetchone()[0])

    def by_series(self) -> Iterator[dict[Key, list[InstanceHeader]]]:
        """See `maesil.ingest.reunite.Headers.by_series`."""
        wanted = "SELECT DISTINCT series FROM scan.keys WHERE series <> x'' ORDER BY series"
        for (series,) in self._tables.execute(wanted):
            owners: dict[Key, list[InstanceHeader]] = {}
            where = "h.key IN (SELECT id FROM scan.keys WHERE series = ?) ORDER BY h.listed, h.seq"
            for header in self._headers(where, series):
                owners.setdefault((header.patient, header.study, header.series), []).append(header)
            if owners:
                self.given += sum(map(len, owners.values()))
                yield owners
            self._on_series()

    def single_slices(self, planned: Planned) -> Iterator[list[InstanceHeader]]:
        """See `maesil.ingest.reunite.Headers.single_slices`; ``planned`` is a table of this connection."""
        little = (
            "SELECT k.id FROM outcomes p JOIN scan.keys k ON k.patient = p.patient AND k.study = p.study AND "
            "k.series = p.series WHERE p.too_little"
        )
        few = f"SELECT key FROM scan.headers GROUP BY key HAVING count(*) <= {SLICES_WITH_A_COPY}"
        self._tables.execute(f"CREATE TEMP TABLE singles AS {little} INTERSECT {few}")
        if self._tables.execute("SELECT count(*) FROM singles").fetchone()[0]:
            where = "h.key IN singles ORDER BY repr_of(k.patient), s.kind, h.listed, h.seq"
            columns = _HEADERS.replace("SELECT", "SELECT repr_of(k.patient), s.kind,")
            rows = self._tables.execute(f"{columns} WHERE {where}")
            for _, group in groupby(rows, key=lambda row: row[:2]):
                yield [_header(*row[2:]) for row in group]
        self._tables.execute("DROP TABLE singles")

    def blank(self) -> Iterator[tuple[tuple[str, str], list[InstanceHeader]]]:
        """See `maesil.ingest.reunite.Headers.blank`."""
        wanted = "SELECT id, patient, study FROM scan.keys WHERE series = x'' ORDER BY patient, study"
        for key, patient, study in self._tables.execute(wanted):
            if slices := list(self._headers("h.key = ? ORDER BY h.listed, h.seq", key)):
                self.given += len(slices)
                yield (text_of(patient), text_of(study)), slices

    def require_all_given(self) -> None:
        """Raise `DamagedRow` where headers of the scan were met in no series."""
        (there,) = self._tables.execute("SELECT count(*) FROM scan.headers").fetchone()
        if there != self.given:
            raise DamagedRow(f"expected {there} headers in series and studies, found {self.given}")

    def _headers(self, where: str, *values: object) -> Iterator[InstanceHeader]:
        for row in self._tables.execute(f"{_HEADERS} WHERE {where}", values):
            yield _header(*row)


def _header(
    path: bytes, patient: bytes, study: bytes, series: bytes, own: bytes, said: bytes, shared: bytes
) -> InstanceHeader:
    return header_of(path_of(path), Rows((text_of(patient), text_of(study), text_of(series)), own, said, shared))


class OtherFiles(Collection[FileVerdict]):
    """The verdicts of a scan on files that hold no CT, in the order of the scan."""

    def __init__(self, tables: sqlite3.Connection) -> None:
        self._tables = tables

    def __len__(self) -> int:
        return int(self._tables.execute("SELECT count(*) FROM scan.others").fetchone()[0])

    def __iter__(self) -> Iterator[FileVerdict]:
        for path, row in self._tables.execute(f"SELECT f.path, o.row {_OTHERS}"):
            status, code, detail = unpacked(row)
            yield FileVerdict(path_of(path), status, code, detail=detail)

    def __contains__(self, verdict: object) -> bool:
        return any(verdict == other for other in self)


def niftis_of(tables: sqlite3.Connection) -> Iterable[tuple[SourcePath, Claim]]:
    """Yield the NIfTI files of a scan, and what their headers claim."""
    wanted = "SELECT f.path, n.row FROM scan.niftis n JOIN scan.files f ON f.n = n.file ORDER BY n.listed, n.seq"
    for path, row in tables.execute(wanted):
        yield path_of(path), Claim(*unpacked(row))
