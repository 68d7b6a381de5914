"""The report folder of an ingest: tables for programs and a page to look at. It names paths: never within the store."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from maesil.documents import parsed_json, read_json, write_json
from maesil.files import make_folder, write_whole
from maesil.ingest import report_folder
from maesil.ingest.page import RefusedSource, page
from maesil.ingest.phi import PhiScan
from maesil.ingest.report_folder import Noted, RunRecord
from maesil.ingest.source_path import SourcePath, SourcePlace
from maesil.ingest.summary import Summary
from maesil.ingest.verdict import OTHER_PARTITION
from maesil.ingest.verdict_tables import Verdicts
from maesil.store.remedies import remedy
from maesil.store.store import Store, is_store
from maesil.store.urls import StorePlace
from maesil.text import printable
from maesil.version import __version__


def write_report(folder: Path, summary: Summary, store_path: StorePlace) -> None:
    """Merge a run into the report of its store: the tables, the history, ``summary.json`` and ``index.html``.

    All files are readable by their owner alone. UsageError where the folder is another store's. Where nothing was found
    there may be no store: the report then tells of the files alone.
    """
    store = Store.open(store_path) if is_store(store_path) or summary.found else None
    report_folder.require_place(folder, store_path)
    make_folder(folder)
    with report_folder.alone(folder):
        report_folder.own(folder, store_path)
        run = datetime.now(UTC).isoformat(timespec="seconds")
        rows = _merge(folder, summary, store, run)
        runs = _add_run(folder, summary, run)
        refused = refused_sources(store, rows)
        write_whole(folder / report_folder.REFUSED, _quarantine_table(refused), private=True)
        write_json(folder / report_folder.SUMMARY, summary.document_without_files(), private=True)
        sources = report_folder.files_by_volume(rows)
        is_part = any(code == OTHER_PARTITION for _, code in summary.files.tally())
        of_all_parts = Verdicts(noted.verdict for noted in rows) if is_part else None
        text = page(summary, store_path, store, sources, refused, runs, of_all_parts)
        write_whole(folder / report_folder.PAGE, text, private=True)


def note_phi_scan(folder: Path, phi_scan: PhiScan) -> None:
    """Write into ``summary.json`` what a search for the patients of the sources looked at and found."""
    path = folder / report_folder.SUMMARY
    write_json(path, read_json(path) | {"phi_scan": phi_scan.document()}, private=True)


def _merge(folder: Path, summary: Summary, store: Store | None, run: str) -> list[Noted]:
    """Write the newest verdict on every file; those that no longer hold go to the table of earlier ones."""
    before = report_folder.known_verdicts(folder)
    now = [Noted(verdict, run) for verdict in summary.files]
    known = {volume.volume_id for volume in (*store.volumes(), *store.outdated())} if store else set()
    known |= {record.volume_id for record in store.quarantined()} if store else set()
    rows, replaced = report_folder.merged(before, now, known, whole=summary.whole)
    report_folder.add_earlier(folder, replaced)
    report_folder.write_noted(folder / report_folder.FILES, rows)
    return rows


def _add_run(folder: Path, summary: Summary, run: str) -> list[RunRecord]:
    """Add a run to the history, one JSON object a line, and return all of them, the newest last."""
    document = {"run": run, "version": __version__} | {
        name: value
        for name, value in summary.document_without_files().items()
        if name in ("sources", "files_found", "counts", "codes", "committed", "refused_volumes", "damaged_files")
    }
    document |= {"fresh": len(summary.fresh)}
    path = folder / report_folder.RUNS
    lines = path.read_bytes().splitlines() if path.exists() else []
    lines.append(json.dumps(document).encode())
    write_whole(path, b"\n".join(lines) + b"\n", private=True)
    return [found for line in lines if (found := _run_of(line)) is not None]


def _run_of(line: bytes) -> RunRecord | None:
    try:
        found = parsed_json(line)
    except ValueError:
        return None
    return cast(RunRecord, found) if isinstance(found, dict) and "run" in found else None


def refused_sources(store: Store | None, rows: Sequence[Noted]) -> list[RefusedSource]:
    """Return all refused sources of a store with their files: those in its quarantine, and single damaged files."""
    files = report_folder.files_by_volume(rows)
    found = [
        RefusedSource(record.volume_id, record.code, record.detail, tuple(files.get(record.volume_id, ())),
                      record.numbers or {}, record.files)
        for record in (store.quarantined() if store else ())
    ]  # fmt: skip
    damaged: dict[tuple[SourcePlace, str, str], list[SourcePath]] = defaultdict(list)
    for verdict in (noted.verdict for noted in rows):
        if verdict.status == "quarantined" and not verdict.volume_ids:
            damaged[verdict.path.parent, verdict.code, verdict.detail].append(verdict.path)
    return found + [RefusedSource("", code, detail, tuple(paths)) for (_, code, detail), paths in damaged.items()]


def _quarantine_table(refused: Sequence[RefusedSource]) -> str:
    """One row a refused source, with its first file and what to do about it."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["volume_id", "code", "detail", "files", "numbers", "first_file", "what_to_do"])
    for source in refused:
        first = printable(source.paths[0]) if source.paths else ""
        numbers, count = json.dumps(source.numbers), len(source.paths) if source.files is None else source.files
        what = remedy(source.code)
        table.writerow([source.volume_id, source.code, printable(source.detail), count, numbers, first, what])
    return text.getvalue()
