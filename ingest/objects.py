"""Sources in object storage: listed and not walked, headers read by range, whole objects fetched when they are decoded.

Requests are tried again as those of a store are. What is wrong with one object costs that object a verdict; a server
that answers nobody ends the run.
"""

from __future__ import annotations

import functools
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from maesil.errors import NoInputError, Refused, ResourceError, StoreError, UsageError
from maesil.ingest.source_path import ObjectFile, SourcePath, SourcePlace
from maesil.store.backends import open_storage
from maesil.store.store import ZARR_DOCUMENT, is_store
from maesil.store.urls import ObjectUrl

if TYPE_CHECKING:
    from maesil.store.object_storage import ObjectStorage

AHEAD = 1 << 16
"""Bytes of one read of a header: nearly every header of a slice is shorter."""
_HEADS_AT_ONCE = 32
_LISTINGS_AT_ONCE = 16
_PIECE = 8 << 20
_PIECES_AT_ONCE = 16
"""So many pieces of one series are on their way at once, and no more wait in memory."""
_VARIABLES = ("AWS_", "GOOGLE_", "AZURE_")
_GONE = "the object was there when it was listed, and is gone or shorter now"


# Listing --------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class ListedUrl(ObjectUrl):
    """A place in object storage whose objects were listed already."""

    files: tuple[ObjectFile, ...] = field(default=(), compare=False)


def listed(places: Sequence[SourcePlace], on_missing: Callable[[SourcePlace, NoInputError], None]) -> list[SourcePlace]:
    """Return the places with those in object storage listed, several at once; those that hold nothing are left out.

    ResourceError or UsageError where a bucket cannot be listed.
    """

    def look(place: SourcePlace) -> SourcePlace | NoInputError:
        try:
            if isinstance(place, ObjectUrl):
                return ListedUrl(place.scheme, place.bucket, place.folder, tuple(objects_below(place)))
            return place
        except NoInputError as error:
            return error

    there = []
    with ThreadPoolExecutor(_LISTINGS_AT_ONCE) as pool:
        for place, found in zip(places, pool.map(look, places), strict=True):
            if isinstance(found, NoInputError):
                on_missing(place, found)
            else:
                there.append(found)
    return there


def objects_below(place: ObjectUrl) -> Sequence[ObjectFile]:
    """Return the object of this name, or all below it, sorted; those of Zarr folders are left out, as on a disk.

    NoInputError where there is none; UsageError for a store, which is no source.
    """
    if isinstance(place, ListedUrl):
        return place.files
    storage = _storage(place)
    found = sorted((_found(place, one) for one in storage.listed(place.folder)), key=lambda file: file.folder)
    if not found and place.folder:
        with suppress(StoreError):
            found = [_looked_up(ObjectFile(place.scheme, place.bucket, place.folder))]
    if not found:
        raise NoInputError(f"{place}: expected objects with CT at or below it, found none; check the URL")
    zarr = {str(file.parent) for file in found if file.name == ZARR_DOCUMENT}
    if str(place) in zarr and is_store(place):
        raise UsageError(
            f"{place}: expected scans, found a store that `maesil ingest` made; `maesil train {place} --out RUN` "
            f"trains on it, `maesil store info {place}` says what is in it"
        )
    return [file for file in found if not zarr or zarr.isdisjoint(_folders_above(str(file)))]


def _found(place: ObjectUrl, one: Any) -> ObjectFile:
    stamp = one["e_tag"] or one["last_modified"].isoformat()
    return ObjectFile(place.scheme, place.bucket, one["path"], one["size"], stamp)


def _folders_above(url: str) -> set[str]:
    return {url[:at] for at, letter in enumerate(url) if letter == "/"}


def _looked_up(file: ObjectFile) -> ObjectFile:
    """Return an object with its size and stamp, asked of the server now; `StoreError` if it is gone."""
    return _found(file, _storage(file).status(file.folder))


def with_known_size(file: ObjectFile) -> ObjectFile:
    """Return an object with its size and stamp: those of the listing, or asked for where there was none."""
    if file.size >= 0:
        return file
    with _costing_one_verdict(file):
        return _looked_up(file)


def is_object(file: ObjectFile) -> bool:
    """Return whether there is such an object."""
    try:
        return with_known_size(file).size >= 0
    except Refused:
        return False


# Headers, by range ----------------------------------------------------------------------------------


_heads: dict[ObjectFile, Future[bytes]] = {}
"""The first bytes of those objects that are looked at now."""


def with_heads(files: Iterable[SourcePath]) -> Iterator[SourcePath]:
    """Yield files in their order; the first bytes of those in object storage are fetched ahead, many at once."""
    waiting: deque[tuple[SourcePath, Future[bytes] | None]] = deque()
    pool = ThreadPoolExecutor(_HEADS_AT_ONCE)
    try:
        for file in files:
            waiting.append((file, pool.submit(_head, file) if isinstance(file, ObjectFile) else None))
            if len(waiting) > _HEADS_AT_ONCE:
                yield from _with_head(*waiting.popleft())
        while waiting:
            yield from _with_head(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _with_head(file: SourcePath, head: Future[bytes] | None) -> Iterator[SourcePath]:
    if not isinstance(file, ObjectFile) or head is None:
        yield file
        return
    _heads[file] = head
    try:
        yield file
    finally:
        del _heads[file]


def _head(file: ObjectFile) -> bytes:
    with _costing_one_verdict(file):
        return bytes(_storage(file).read_range(file.folder, 0, min(AHEAD, file.size)))


def open_object(file: ObjectFile, ahead: int = AHEAD) -> IO[bytes]:
    """Return a readable, seekable stream of an object: each read is one ranged GET of ``ahead`` bytes at least."""
    file = with_known_size(file)
    head = _heads.get(file)
    return io.BufferedReader(_Ranges(file, b"" if head is None else head.result()), ahead)


class _Ranges(io.RawIOBase):
    """An object as a stream, its first bytes known."""

    def __init__(self, file: ObjectFile, head: bytes) -> None:
        self._file, self._head, self._at = file, head, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        if start + offset < 0:
            raise OSError("expected a place within the object, found one before it")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._file.size - self._at)]
        if known := self._head[self._at : self._at + len(view)]:
            view[: len(known)] = known
            self._at += len(known)
            return len(known)
        with _costing_one_verdict(self._file):
            _storage(self._file).read_into(self._file.folder, self._at, view)
        self._at += len(view)
        return len(view)


# Whole objects --------------------------------------------------------------------------------------


def fetch(files: Sequence[tuple[ObjectFile, Path]]) -> None:
    """Write objects to files of this machine, large ones in pieces, many pieces on their way at once.

    `Refused` for the first object that cannot be read, or that was replaced meanwhile.
    """
    known = [(with_known_size(file), target) for file, target in files]
    pieces = [(file, target, at) for file, target in known for at in range(0, max(file.size, 1), _PIECE)]
    with ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
        for _ in pool.map(_fetch_piece, pieces):  # the first that fails has those that wait given up
            pass
    for file, _ in known:
        if file.size > _PIECE:
            _require_unchanged(file)


def _fetch_piece(piece: tuple[ObjectFile, Path, int]) -> None:
    file, target, at = piece
    with _costing_one_verdict(file):
        data = _storage(file).read_range(file.folder, at, min(_PIECE, file.size - at))
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "wb") as here:
        here.seek(at)
        here.write(data)


def _require_unchanged(file: ObjectFile) -> None:
    with _costing_one_verdict(file):
        now = _looked_up(file)
    if file.stamp and (now.size, now.stamp) != (file.size, file.stamp):
        raise Refused("vanished", "the object was replaced since it was listed; run the same command again")


# Which server ---------------------------------------------------------------------------------------


def _storage(place: ObjectUrl) -> ObjectStorage:
    """Return the storage of a bucket; one for each process and environment, which says who asks whom."""
    environment = frozenset((name, value) for name, value in os.environ.items() if name.startswith(_VARIABLES))
    return _opened(ObjectUrl(place.scheme, place.bucket), os.getpid(), environment)


@functools.lru_cache(maxsize=16)
def _opened(root: ObjectUrl, process: int, environment: frozenset[tuple[str, str]]) -> ObjectStorage:
    return cast("ObjectStorage", open_storage(root))


@contextmanager
def _costing_one_verdict(file: ObjectFile) -> Iterator[None]:
    """Have what goes wrong with one object be a refusal, unless nothing else can be asked of the server either."""
    try:
        yield
    except StoreError:
        raise Refused("vanished", _GONE) from None
    except (UsageError, ResourceError) as error:
        _storage(file).exists(file.parent.folder)
        raise Refused("unreadable", str(error).removeprefix(f"{file}: ")) from None
