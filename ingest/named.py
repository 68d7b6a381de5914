"""What the command line names as sources: paths, URLs, rows of a manifest, collections of the Imaging Data Commons.

The Imaging Data Commons is a public archive of the US National Cancer Institute. Its table of series is the package
``idc-index-data``; the same columns serve in a manifest.
"""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from maesil.errors import MaesilError, NoInputError, UsageError
from maesil.ingest.objects import ListedUrl, listed
from maesil.ingest.source_path import SourcePlace
from maesil.installed import IDC, not_installed
from maesil.parquet import read_parquet
from maesil.sizes import size_text
from maesil.store.urls import ObjectUrl, place_of
from maesil.text import counted, printable

PLACES = ("series_url", "series_aws_url", "path")
"""Columns of a manifest that may say where a series lies; the first of them that it has counts."""
TABLE_VARIABLE = "MAESIL_IDC_TABLE"
"""Names another table of series than that of the package (Parquet, the same columns)."""
_IDC = "idc://"
_COLLECTION, _MODALITY = "collection_id", "Modality"
_IN_ORDER = ("PatientID", "SeriesInstanceUID", "series_aws_url")
_COLUMNS = (_COLLECTION, _MODALITY, *_IN_ORDER)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Named:
    """The sources of a command."""

    places: list[SourcePlace]
    left_out: int = 0
    """Rows that lead to no series; a line was said on each."""


def named_sources(words: Sequence[str], manifest: Path | None, limit: int | None, say: Say) -> Named:
    """Return the sources that words and a manifest name; those in object storage are listed, and their size is said.

    At most ``limit`` series are taken of the manifest and the collections together. A row that leads nowhere costs a
    line. UsageError or NoInputError where a word does, and where nothing is left.
    """
    plain = [place_of(word) for word in words if not word.startswith(_IDC)]
    collections = [word.removeprefix(_IDC) for word in words if word.startswith(_IDC)]
    if not (words or manifest):
        raise UsageError("expected SRC or --manifest, found neither; name files, folders, a URL or a table of series")
    if limit is not None and manifest is None and not collections:
        raise UsageError("--limit-series: counts the series of --manifest or idc://COLLECTION; name one of them")
    rows = _Rows(say)
    series = [*(rows.of(manifest) if manifest else ()), *_of_collections(collections)]
    series = list(islice(dict.fromkeys(series), limit))
    places = [*_listed_or_raise(plain), *listed(series, rows.leads_nowhere)]
    if not places:
        raise NoInputError(f"{manifest}: expected series with CT, found none that can be read; look at the lines above")
    _say_size(places, say)
    return Named(places, rows.left_out)


def _listed_or_raise(places: Sequence[SourcePlace]) -> list[SourcePlace]:
    def fail(place: SourcePlace, error: NoInputError) -> None:
        raise error

    return listed(places, fail)


def _say_size(places: Sequence[SourcePlace], say: Say) -> None:
    """Say how much lies in object storage before any of it moves."""
    found = [place for place in places if isinstance(place, ListedUrl)]
    if found:
        files = [file for place in found for file in place.files]
        size = size_text(sum(file.size for file in files))
        where = f"{counted(len(files), 'object')} of {size} in {counted(len(found), 'place')}"
        say(f"found {where}; headers are read first")


# Manifests ------------------------------------------------------------------------------------------


class _Rows:
    """The rows of a manifest; says a line on each that leads to no series."""

    def __init__(self, say: Say) -> None:
        self.left_out = 0
        self._say = say
        self._where: dict[SourcePlace, str] = {}

    def of(self, manifest: Path) -> Iterator[SourcePlace]:
        """Yield where the series of a manifest lie, those of another modality than CT left out."""
        others = 0
        for line, row in _read(manifest):
            if row.get(_MODALITY, "CT").strip().upper() not in ("CT", ""):
                others += 1
                continue
            where = f"{printable(manifest)}, line {line}"
            try:
                place = _place(row, manifest.parent)
            except MaesilError as error:
                self._leave_out(f"{where}: {error}")
            else:
                self._where.setdefault(place, where)
                yield place
        if others:
            self._say(f"{printable(manifest)}: {counted(others, 'row')} of other modalities than CT left out")

    def leads_nowhere(self, place: SourcePlace, error: NoInputError) -> None:
        """Leave out a series that is not where its row says."""
        where = self._where.get(place)
        self._leave_out(f"{where}: {error}" if where else str(error))

    def _leave_out(self, told: str) -> None:
        self.left_out += 1
        self._say(f"{told}; left out")


def _read(manifest: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield number of line and values of each row; UsageError where no column says where series lie."""
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, restval="")
            names = table.fieldnames or ()
            if not set(PLACES) & set(names):
                found = ", ".join(names) or "nothing"
                raise UsageError(
                    f"--manifest: {printable(manifest)}: expected a column {' or '.join(PLACES)} in its first line, "
                    f"found {printable(found)[:100]}"
                )
            for row in table:
                yield table.line_num, {str(name): value for name, value in row.items() if isinstance(value, str)}
    except FileNotFoundError:
        told = f"--manifest: {printable(manifest)}: expected a CSV file, found none; check the path"
        raise NoInputError(told) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        told = f"{error.strerror}" if isinstance(error, OSError) else "no text in UTF-8, or no CSV"
        raise UsageError(f"--manifest: {printable(manifest)}: expected a CSV file, found: {told}") from None


def _place(row: Mapping[str, str], beside: Path) -> SourcePlace:
    """Return where the series of a row lies; a relative path is taken from the folder of the manifest."""
    text = next(row[name] for name in PLACES if name in row).strip()
    if not text:
        raise UsageError("expected a URL or a path, found an empty field")
    place = _series_place(text)
    if isinstance(place, ObjectUrl):
        return place
    if not (beside / place).exists():
        raise NoInputError(f"{printable(place)}: expected a file or folder with CT, found nothing there")
    return beside / place


def _series_place(text: str) -> SourcePlace:
    """Return what a URL names that may end in ``/*``, as those of the Imaging Data Commons do."""
    return place_of(text.removesuffix("*"))


# The Imaging Data Commons ---------------------------------------------------------------------------


def _of_collections(names: Sequence[str]) -> Iterator[SourcePlace]:
    if not names:
        return
    table = _series_table()
    for name in names:
        wanted = name.strip("/").lower().replace("-", "_")
        of_it = table.filter(pc.equal(table[_COLLECTION], wanted))
        if not of_it.num_rows:
            raise UsageError(_unknown(name, pc.unique(table[_COLLECTION]).to_pylist()))
        of_it = of_it.filter(pc.equal(of_it[_MODALITY], "CT"))
        if not of_it.num_rows:
            raise NoInputError(f"{_IDC}{name}: expected series of CT in this collection, found those of others only")
        in_order = sorted(zip(*(of_it[column].to_pylist() for column in _IN_ORDER), strict=True))
        yield from (_series_place(url) for *_, url in in_order)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    told = f"did you mean {_IDC}{near[0]}?" if near else "look at https://portal.imaging.datacommons.cancer.gov"
    return f"{_IDC}{printable(name)}: expected a collection of the Imaging Data Commons, found no such name; {told}"


def _series_table() -> pa.Table:
    """Return the table of all series: that of the package, or the one that the environment names."""
    place = os.environ.get(TABLE_VARIABLE)
    if not place:
        if not_installed(IDC):
            raise UsageError(f"{_IDC}: its table needs the package idc-index-data; pip install 'maesil[idc]'")
        place = str(importlib.import_module(IDC[0]).IDC_INDEX_PARQUET_FILEPATH)
    try:
        return read_parquet(Path(place), _COLUMNS)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(
            f"{TABLE_VARIABLE}: {place}: expected a Parquet table with {', '.join(_COLUMNS)}, found: "
            f"{str(error).splitlines()[0][:100]}"
        ) from None
