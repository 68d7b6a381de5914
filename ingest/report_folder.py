"""A report folder over many runs: whose it is, and the newest verdict on every file that any run met.

Each run is merged into what the folder knows, volume by volume. A store grows by runs over other sources, and only the
folder knows which files a volume came from.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa

from maesil.documents import read_json, write_json
from maesil.errors import DamagedError, ResourceError, UsageError
from maesil.files import LOCK, require_folder_place, require_writable, write_whole
from maesil.ingest.source_path import SourcePath, common_folder, source_path
from maesil.ingest.verdict import OTHER_PARTITION, FileVerdict
from maesil.locks import locked
from maesil.parquet import read_parquet, to_parquet
from maesil.store.urls import ObjectUrl, StorePlace, lies_in, place_of
from maesil.text import counted, exact, printable, written

OWNER, FILES, EARLIER, RUNS = "store.json", "files.parquet", "earlier.parquet", "runs.jsonl"
PAGE, SUMMARY, REFUSED = "index.html", "summary.json", "quarantine.csv"
_TEXTS = ("path", "status", "code", "volume_id", "detail")
_SCHEMA = pa.schema(
    [*(pa.field(name, pa.string()) for name in _TEXTS), ("more_volumes", pa.list_(pa.string())), ("run", pa.string())]
)


class RunRecord(TypedDict, total=False):
    """What the history of a store says of one run; a line of an earlier version may lack some of it."""

    run: str
    """When it began."""
    version: str
    """Of maesil."""
    sources: list[str]
    files_found: int
    counts: dict[str, int]
    codes: dict[str, int]
    committed: list[str]
    refused_volumes: int
    damaged_files: int
    fresh: int


@dataclass(frozen=True, slots=True)
class Noted:
    """A verdict on a file, and the run that gave it (ISO 8601, UTC)."""

    verdict: FileVerdict
    run: str

    @property
    def fact(self) -> tuple[object, ...]:
        """What the verdict says, whenever it was given: a volume that was made and one that is there are the same."""
        verdict = self.verdict
        code = "" if verdict.status == "used" else verdict.code
        return verdict.path, verdict.status, code, verdict.volume_ids, verdict.detail


def default_folder(store: StorePlace) -> Path:
    """Return where the report of a store lies unless told otherwise: beside it; of object storage, in this folder."""
    name = f"{store.name.removesuffix('.zarr')}.report"
    return store.with_name(name) if isinstance(store, Path) else Path(name)


def require_place(folder: Path, store: StorePlace) -> None:
    """Raise UsageError unless a folder may hold the report of this store: outside it, and of no other store's."""
    if lies_in(folder, store):
        raise UsageError(f"--report: expected a folder outside the store, since it holds paths; found {folder}")
    require_folder_place(folder)
    require_writable(folder, "--report")
    other = _other_owner(folder, store)
    if other is not None:
        raise UsageError(f"--report: {folder} holds the report of another store, {other}; name another folder")
    strange = [name for name in (PAGE, SUMMARY, REFUSED) if (folder / name).exists()]
    if strange and not (folder / FILES).exists():
        raise UsageError(f"--report: {folder} holds a {strange[0]} that is not of a report; name another folder")


def _other_owner(folder: Path, store: StorePlace) -> StorePlace | None:
    """Return the store that a folder belongs to, if that is another one and still there."""
    try:
        document = read_json(folder / OWNER)
        owner, beside = place_of(exact(document["store"])), exact(document["beside"])
    except (OSError, DamagedError, KeyError, TypeError):  # the report is made anew
        return None
    if isinstance(owner, ObjectUrl):
        return None if owner == store else owner
    places = [(folder / beside).resolve(), owner]
    # Store and folder may have been moved or copied together: then the way from one to the other is as it was.
    there = [place for place in places if (place / "zarr.json").exists()]
    return None if not there or store.resolve() in there else there[0]


def own(folder: Path, store: StorePlace) -> None:
    """Note whose report this is."""
    beside = os.path.relpath(store.resolve(), folder.resolve()) if isinstance(store, Path) else ""
    document = {"store": written(store.resolve()), "beside": written(beside)}
    write_json(folder / OWNER, document, private=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the one process that writes a report: the parts of a job array share it."""
    with ExitStack() as held:
        with suppress(ResourceError):  # a file system without locks: parts may then overwrite each other's rows
            held.enter_context(locked(folder / LOCK))
        yield


def merged(
    before: Sequence[Noted], now: Sequence[Noted], kept_ids: set[str], *, whole: bool
) -> tuple[list[Noted], list[Noted]]:
    """Return what is known after a run, and what was known before and no longer holds.

    A new verdict takes the place of an older one on the same file or volume. Older verdicts on other files stay while
    the store knows their volume (``kept_ids``, live or refused); none does where the run saw all sources of the store
    (``whole``). What a run left to another part of the work says nothing.
    """
    known = {noted.verdict.path for noted in before}
    now = [noted for noted in now if noted.verdict.code != OTHER_PARTITION or noted.verdict.path not in known]
    paths = {noted.verdict.path for noted in now}
    ids = {volume_id for noted in now for volume_id in noted.verdict.volume_ids}
    kept: list[Noted] = []
    replaced: list[Noted] = []
    for noted in before:
        own_ids = set(noted.verdict.volume_ids)
        stale = whole or noted.verdict.path in paths or bool(own_ids & ids) or bool(own_ids and not own_ids & kept_ids)
        (replaced if stale else kept).append(noted)
    facts = {noted.fact for noted in now}
    return kept + now, [noted for noted in replaced if noted.fact not in facts]


def read_noted(path: Path) -> list[Noted]:
    """Return the rows of a table of verdicts, those of earlier versions among them; OSError or ArrowException."""
    return [_noted(row) for row in read_parquet(path).to_pylist()]


def _noted(row: dict[str, Any]) -> Noted:
    more = tuple(row.get("more_volumes") or ())
    code, detail = row.get("code") or "", row.get("detail") or ""
    verdict = FileVerdict(source_path(exact(row["path"])), row["status"], code, row.get("volume_id"), detail, more)
    return Noted(verdict, row.get("run") or "")


def known_verdicts(folder: Path) -> list[Noted]:
    """Return the newest verdict on every file that any run met; nothing where there is no readable report."""
    try:
        return read_noted(folder / FILES)
    except (OSError, pa.ArrowException, KeyError):
        return []


def write_noted(path: Path, rows: Iterable[Noted]) -> None:
    """Write a table of verdicts, readable by its owner alone."""
    documents = [{**noted.verdict.document(), "run": noted.run} for noted in rows]
    write_whole(path, to_parquet(pa.Table.from_pylist(documents, schema=_SCHEMA)), private=True)


def add_earlier(folder: Path, replaced: Sequence[Noted]) -> None:
    """Add verdicts that no longer hold to the table of earlier ones."""
    if not replaced:
        return
    with suppress(OSError, pa.ArrowException, KeyError):
        replaced = [*read_noted(folder / EARLIER), *replaced]
    write_noted(folder / EARLIER, replaced)


def files_of(folder: Path, store: StorePlace) -> dict[str, list[SourcePath]]:
    """Return the files that each volume of a store came from, as its report says; nothing where that is another's."""
    return {} if _other_owner(folder, store) else files_by_volume(known_verdicts(folder))


def files_by_volume(rows: Iterable[Noted]) -> dict[str, list[SourcePath]]:
    """Return the files that each volume or refused source came from, by its id."""
    found: dict[str, list[SourcePath]] = defaultdict(list)
    for noted in rows:
        if noted.verdict.status in ("used", "quarantined"):
            for volume_id in noted.verdict.volume_ids:
                found[volume_id].append(noted.verdict.path)
    return dict(found)


def source_text(files: Sequence[SourcePath]) -> str:
    """Return in one line where the files of a volume lie: the file, or the folder that holds them all."""
    if len(files) < 2:
        return printable(files[0]) if files else ""
    return f"{printable(common_folder([file.parent for file in files]))} ({counted(len(files), 'file')})"
