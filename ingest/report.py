"""The report folder of an ingest: tables for programs and a page to look at. It names paths: never within the store."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from maesil.files import make_folder
from maesil.ingest.page import page
from maesil.ingest.summary import Summary
from maesil.ingest.verdict import FileVerdict
from maesil.parquet import to_parquet
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store

_FILE_COLUMNS = ("path", "status", "code", "volume_id", "detail")


def write_report(folder: Path, summary: Summary, store_path: Path) -> None:
    """Write ``files.parquet``, ``quarantine.csv``, ``summary.json`` and ``index.html`` into a folder."""
    store = Store.open(store_path)
    make_folder(folder)
    _put(folder / "files.parquet", _files_table(summary.files))
    _put(folder / "quarantine.csv", _quarantine_table(store, summary.files).encode())
    _put(folder / "summary.json", json.dumps(_without_files(summary), indent=1).encode())
    _put(folder / "index.html", page(summary, store, SuperpatchReader(store)).encode())


def _put(path: Path, data: bytes) -> None:
    """Write a file all at once: a page half written must not be looked at."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)


def _files_table(files: list[FileVerdict]) -> bytes:
    columns: dict[str, list[Any]] = {
        "path": [str(verdict.path).encode("utf-8", "replace").decode() for verdict in files],
        **{name: [getattr(verdict, name) for verdict in files] for name in _FILE_COLUMNS[1:]},
    }
    schema = pa.schema([pa.field(name, pa.string()) for name in _FILE_COLUMNS])
    return to_parquet(pa.table(columns, schema=schema))


def _quarantine_table(store: Store, files: list[FileVerdict]) -> str:
    """One row a refused source, with its first file where this run met it."""
    first: dict[tuple[str, str], Path] = {}
    for verdict in files:
        if verdict.status == "quarantined":
            first.setdefault((verdict.code, verdict.detail), verdict.path)
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["volume_id", "code", "detail", "files", "numbers", "first_file"])
    for record in store.quarantined():
        numbers = json.dumps(record.get("numbers", {}))
        path = first.get((record["code"], record["detail"]), Path())
        rows.writerow([record["volume_id"], record["code"], record["detail"], record.get("files", ""), numbers, path])
    return text.getvalue()


def _without_files(summary: Summary) -> dict[str, Any]:
    document = summary.document()
    del document["files"]  # they are in files.parquet
    return document
