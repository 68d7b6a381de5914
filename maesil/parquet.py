"""Parquet tables, written and read without Arrow's threads: one that is still running when Python ends aborts it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def to_parquet(table: pa.Table) -> bytes:
    """Return a table as the bytes of a file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(source: bytes | pa.Buffer | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a table, or some columns of it; OSError or `pyarrow.ArrowException` for what is none.

    Not by ``pyarrow.parquet.read_table``, which reads through Arrow's data sets (apache/arrow issue 34314).
    """
    with _opened(source) as file:
        return file.read(columns=columns, use_threads=False)


def parquet_metadata(source: bytes) -> dict[bytes, bytes]:
    """Return what a table's schema says beside its columns; errors as of `read_parquet`."""
    with _opened(source) as file:
        return file.schema_arrow.metadata or {}


def _opened(source: bytes | pa.Buffer | Path) -> pq.ParquetFile:
    """Open a file that is read here and now: no reading ahead, and no memory of Python's for a thread to let go of."""
    source = buffer_of(source) if isinstance(source, bytes) else source
    source = pa.BufferReader(source) if isinstance(source, pa.Buffer) else source
    return pq.ParquetFile(source, pre_buffer=False)


def buffer_of(data: bytes) -> pa.Buffer:
    """Return a copy of bytes in Arrow's own memory, for who reads columns of one file at several times."""
    copy = pa.allocate_buffer(len(data))
    memoryview(copy).cast("B")[:] = data
    return copy
