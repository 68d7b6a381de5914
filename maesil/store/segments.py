"""A segment of the table of volumes: the records of some thousand commits in the columns of one Parquet file.

Opening a store must not make a Python object of each superpatch. So a volume of a segment knows its names and hashes
at once; everything else is taken from the columns when it is first asked for (`maesil.store.records.Volume`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maesil.documents import canonical_json
from maesil.parquet import buffer_of, read_parquet, to_parquet
from maesil.store.commit import attempt_prefix
from maesil.store.records import Superpatch, Volume

_NAMES = ("volume_id", "group", "attempt", "source_hash", "recipe_hash")
"""Fields that every volume of a segment has from the start, besides its generation."""
_PATCH_NUMBERS = {
    "iz": pa.int32(), "iy": pa.int32(), "ix": pa.int32(), "offset": pa.int64(), "length": pa.int64(),
    "crc32c": pa.int64(), "valid": pa.float64(), "body": pa.float64(), "air": pa.float64(),
}  # fmt: skip
_PATH = "path"
_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in _NAMES),
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("record", pa.binary(), nullable=False),
        *(pa.field(name, pa.list_(kind), nullable=False) for name, kind in _PATCH_NUMBERS.items()),
        pa.field(_PATH, pa.list_(pa.string()), nullable=False),
    ]
)
GONE = 0
"""Generation of a row that says: this volume was taken out of the store."""


class Segment:
    """Rows of the table, one a volume; a later segment overrides an earlier one."""

    def __init__(self, table: pa.Table, file: pa.Buffer | None = None) -> None:
        """``file`` holds what ``table`` lacks: columns that are read when somebody asks for them."""
        self._rows, self._file = int(table.num_rows), file
        self._fields: dict[str, pa.Field] = {}
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._lists: dict[str, tuple[NDArray[np.int32], Any]] = {}
        self._keep(table)

    def __len__(self) -> int:
        return self._rows

    @property
    def table(self) -> pa.Table:
        """All columns."""
        columns = [self._column(name) for name in _SCHEMA.names]
        return pa.table(columns, schema=pa.schema([self._fields[name] for name in _SCHEMA.names]))

    def _column(self, name: str) -> pa.ChunkedArray:
        """Return a column, read from the file where it was not yet; two threads may do so at once."""
        if name not in self._columns:
            self._keep(read_parquet(self._file, [name]).combine_chunks())
        return self._columns[name]

    def _keep(self, table: pa.Table) -> None:
        for field, column in zip(table.schema, table.columns, strict=True):
            self._fields[field.name], self._columns[field.name] = field, column

    @classmethod
    def of(cls, volumes: Sequence[Volume], gone: Iterable[str] = ()) -> Segment:
        """Return the rows of volumes, and of ids that are no volume any more."""
        rows = [*map(_row, volumes), *map(_row_of_gone, gone)]
        return cls(pa.Table.from_pylist(rows, schema=_SCHEMA))

    @classmethod
    def read(cls, data: bytes) -> Segment:
        """Return the segment of a file; `pyarrow.ArrowException` or OSError for what is none.

        To open a large store takes the names of its volumes alone; all else would take three times as long.
        """
        file = buffer_of(data)
        return cls(read_parquet(file, (*_NAMES, "generation")).combine_chunks(), file)

    def to_bytes(self) -> bytes:
        """Return the file."""
        return to_parquet(self.table)

    def volumes(self) -> Iterator[tuple[str, Volume | None]]:
        """Yield id and volume of each row, None for one that was taken out; most fields are read when asked for."""
        columns = (self._column(name).to_pylist() for name in (*_NAMES, "generation"))
        for row, values in enumerate(zip(*columns, strict=True)):
            first = dict(zip((*_NAMES, "generation"), values, strict=True))
            there = first["generation"] != GONE
            yield first["volume_id"], Volume.read_later(first, self, row) if there else None

    def fields(self, row: int, name: str) -> dict[str, Any]:
        """Return a field of the volume of a row that it does not know yet, and others that come with it."""
        if name == "superpatches":
            return {name: tuple(self._superpatches(row))}
        return Volume.fields_of(json.loads(self._column("record")[row].as_py()))

    def count(self, row: int) -> int:
        """Return how many superpatches the volume of a row has."""
        offsets, _ = self._list("iz")
        return int(offsets[row + 1] - offsets[row])

    def column(self, row: int, name: str) -> NDArray[Any]:
        """Return one value for each superpatch of a row: a view of a column of `Superpatch`, index by ``iz iy ix``."""
        offsets, values = self._list(name)
        found: NDArray[Any] = values[offsets[row] : offsets[row + 1]]
        return found

    def paths(self, row: int) -> list[str]:
        """Return the shard file of each superpatch of a row."""
        volume_id, attempt = (self._column(name)[row].as_py() for name in ("volume_id", "attempt"))
        prefix = attempt_prefix(volume_id, attempt)
        column = self._column(_PATH)[row].as_py()
        return [prefix + path if path.startswith("/") else path for path in column]

    def _superpatches(self, row: int) -> Iterator[Superpatch]:
        columns = (self.column(row, name).tolist() for name in _PATCH_NUMBERS)
        for path, (iz, iy, ix, *rest) in zip(self.paths(row), zip(*columns, strict=True), strict=True):
            yield Superpatch((iz, iy, ix), path, *rest)

    def _list(self, name: str) -> tuple[NDArray[np.int32], Any]:
        if name not in self._lists:
            lists = self._column(name).combine_chunks()
            if isinstance(lists, pa.ChunkedArray):  # of a table without rows
                lists = lists.chunk(0) if lists.num_chunks else pa.array([], lists.type)
            self._lists[name] = lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False)
        return self._lists[name]


def merged(segments: Sequence[Segment], *, oldest: bool) -> Segment:
    """Return segments as one: of each volume its latest row.

    ``oldest`` if no other segment comes before them: then no row has to say that a volume is gone.
    """
    table = pa.concat_tables([segment.table for segment in segments])
    ids, generations = table["volume_id"].to_pylist(), table["generation"].to_pylist()
    last = {volume_id: row for row, volume_id in enumerate(ids)}
    kept = [row for _, row in sorted(last.items()) if not oldest or generations[row] != GONE]
    return Segment(table.take(pa.array(kept, pa.int64())).combine_chunks())


def _row(volume: Volume) -> dict[str, Any]:
    first = {name: getattr(volume, name) for name in (*_NAMES, "generation")}
    patches, prefix = volume.superpatches, volume.prefix
    columns = zip(*((*p.index, p.offset, p.length, p.crc32c, p.valid, p.body, p.air) for p in patches), strict=True)
    numbers = dict(zip(_PATCH_NUMBERS, columns, strict=True)) if patches else dict.fromkeys(_PATCH_NUMBERS, ())
    others = (one.name for one in dataclasses.fields(volume) if one.name not in (*first, "superpatches"))
    rest = {name: getattr(volume, name) for name in others}
    return {**first, "record": canonical_json(rest), **numbers, _PATH: [_below(p.path, prefix) for p in patches]}


def _row_of_gone(volume_id: str) -> dict[str, Any]:
    nothing = dict.fromkeys((*_PATCH_NUMBERS, _PATH), ())
    names = dict.fromkeys(_NAMES, "")
    return {**names, **nothing, "volume_id": volume_id, "generation": GONE, "record": b""}


def _below(path: str, prefix: str) -> str:
    """Return a path without that of the attempt, which would be the same text a million times."""
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path
