"""The table of volumes: what the commits say, in a few files, so that a store of any size is opened by few requests.

The commits stay the truth. A writer marks a volume before it writes or removes a commit of it, so that whoever opens
the store looks at that volume's commits and believes the table of all others. Marked volumes are taken into the table
from time to time (`VolumeTable.settle`), by any process. Why it is safe: ``docs/decisions/0019``.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import google_crc32c
import pyarrow as pa

from maesil.documents import sealed, unsealed
from maesil.errors import StoreError
from maesil.store.commit import id_and_generation, live_keys
from maesil.store.records import Volume
from maesil.store.segments import Segment, merged
from maesil.store.storage import Storage

TABLE = "table"
FORGET_AFTER_SECONDS = 24 * 3600.0
"""Age of a mark whose writer is taken to be dead: what it announced never came."""
SMALL = 512
"""Volumes of a segment that an addition may rewrite."""
_FACTOR = 4
"""Segments of one size that are merged into one of the next."""
_TRIES = 8
_LOOKS_AT_ONCE = 32
_READ_AT_ONCE = 2048
_MANIFEST = re.compile(rf"{TABLE}/manifests/(\d{{8}})\.json")
_SEGMENT = re.compile(rf"{TABLE}/segments/([0-9a-f]{{32}})\.parquet")
_MARK = re.compile(rf"{TABLE}/pending/(?P<volume_id>[^/.]+)\.(?P<generation>\d{{8}}|gone)-[0-9a-f]{{32}}")
T = TypeVar("T")
R = TypeVar("R")


class StaleTableError(Exception):
    """The table cannot be used, and why; the commits can."""


@dataclass(frozen=True)
class Part:
    """What a manifest says of a segment."""

    name: str
    rows: int
    crc32c: int

    @property
    def key(self) -> str:
        """Key of its file."""
        return f"{TABLE}/segments/{self.name}.parquet"


@dataclass(frozen=True)
class _Listed:
    """What lies in the folder of the table."""

    manifests: tuple[int, ...]
    """Numbers, ascending; the highest counts."""
    marks: tuple[str, ...]
    """Keys."""
    segments: tuple[str, ...]
    """Names."""

    @property
    def number(self) -> int:
        return self.manifests[-1] if self.manifests else 0

    @property
    def marked(self) -> list[str]:
        """Ids of the volumes whose commits may have changed."""
        return sorted({found["volume_id"] for key in self.marks if (found := _MARK.fullmatch(key))})


class VolumeTable:
    """The table of one store; ``volume_of`` returns the volume of a commit by its key and bytes."""

    def __init__(self, storage: Storage, volume_of: Callable[[str, bytes], Volume]) -> None:
        self.storage, self._volume_of = storage, volume_of
        self._loaded: tuple[int, dict[str, Volume]] = (0, {})
        self._astray: list[str] = []
        self._looked: dict[str, Volume] = {}
        self._done: set[str] = set()

    def mark(self, volume_id: str, generation: int | None) -> str:
        """Say that a commit of this generation is about to be written, or (None) that a volume is about to go."""
        what = "gone" if generation is None else f"{generation:08d}"
        key = f"{TABLE}/pending/{volume_id}.{what}-{uuid.uuid4().hex}"
        self.storage.put(key, b"")
        return key

    def done(self, mark: str) -> None:
        """Say that what a mark of this process announced has happened: a table made from now on covers it."""
        self._done.add(mark)

    def volumes(self) -> dict[str, Volume]:
        """Return the live volumes by id; `StaleTableError` where the table is missing, damaged or of other commits."""
        for _ in range(_TRIES):
            listed = self._list()
            if not listed.number:
                raise StaleTableError("is missing")
            try:
                known = self._load(listed.number)
            except FileNotFoundError as error:  # replaced since it was listed, or else it is missing the next time, too
                missing = str(error)
                continue
            looked = self._look([*listed.marked, *self._astray])
            found = {volume_id: volume for volume_id, volume in known.items() if volume_id not in looked}
            return found | {volume_id: volume for volume_id, volume in looked.items() if volume is not None}
        raise StaleTableError(f"is damaged ({missing} is missing)")

    def settle(self, *, whole: bool = False) -> bool:
        """Take the marked volumes into the table; ``whole`` compares it with the list of all commits, too.

        A table that is missing or damaged is made anew. Any number of processes may do so at once: what one of them
        wrote counts, and the others begin again. Return whether a table that covers all marks seen is in place.
        """
        for _ in range(_TRIES):
            listed = self._list()
            try:
                parts = self._manifest(listed.number) if listed.number else None
                known = self._load(listed.number) if whole and parts is not None else {}
            except (FileNotFoundError, StaleTableError):
                parts, known = None, {}
            looked = self._look(listed.marked)
            changed = dict(looked)
            if known:  # what the table says is at hand: what it says already need not be written again
                changed = {one: volume for one, volume in looked.items() if known.get(one) != volume}
            differing: list[str] = []
            if whole or parts is None:
                differing, gone = self._differing(known, looked)
                changed |= dict.fromkeys(gone)
            new = parts
            if changed or differing or parts is None:
                try:
                    new = self._with(parts or (), changed, differing)
                except (FileNotFoundError, StaleTableError):
                    whole = True
                    continue
                if not self._publish(listed.number, new):
                    continue
            self._clear(listed, looked, {part.name for part in (*(parts or ()), *(new or ()))})
            return True
        return False

    def leftovers(self) -> list[str]:
        """Return the keys of manifests and segments that no reader needs; young ones may be of a process at work."""
        listed = self._list()
        try:
            used = {part.name for part in self._manifest(listed.number)} if listed.number else set()
        except (FileNotFoundError, StaleTableError):
            return []
        old = [_manifest_key(number) for number in listed.manifests if number < listed.number]
        return old + [Part(name, 0, 0).key for name in listed.segments if name not in used]

    def _list(self) -> _Listed:
        keys = list(self.storage.list(TABLE))
        manifests = sorted(int(found[1]) for key in keys if (found := _MANIFEST.fullmatch(key)))
        segments = tuple(found[1] for key in keys if (found := _SEGMENT.fullmatch(key)))
        return _Listed(tuple(manifests), tuple(key for key in keys if _MARK.fullmatch(key)), segments)

    def _manifest(self, number: int) -> tuple[Part, ...]:
        """Return the segments of a manifest, oldest first; FileNotFoundError, StaleTableError."""
        key = _manifest_key(number)
        data = self._bytes(key)
        try:
            document = unsealed(data)
            if document["number"] != number:
                raise ValueError(f"it is number {document['number']}")
            return tuple(Part(**part) for part in document["segments"])
        except (ValueError, KeyError, TypeError) as error:
            raise StaleTableError(f"is damaged ({key})") from error

    def _load(self, number: int) -> dict[str, Volume]:
        """Return the volumes of a manifest by id, from memory where it is the last one that was read."""
        if self._loaded[0] == number:
            return self._loaded[1]
        found: dict[str, Volume] = {}
        for segment in self._segments(self._manifest(number)):
            for volume_id, volume in segment.volumes():
                if volume is None:
                    found.pop(volume_id, None)
                else:
                    found[volume_id] = volume
        # Somebody may have removed the commits of a volume by hand, who knew nothing of a table.
        names = self.storage.names_two_below("commits")
        self._astray = [] if names is None else sorted(found.keys() ^ names)
        if len(self._astray) > _READ_AT_ONCE:
            raise StaleTableError(f"is of other commits ({len(self._astray)} volumes differ)")
        self._loaded = number, found
        return found

    def _segments(self, parts: Sequence[Part]) -> list[Segment]:
        """Read segments, all on their way at once; FileNotFoundError, StaleTableError."""
        return _at_once(self._segment, parts)

    def _segment(self, part: Part) -> Segment:
        data = self._bytes(part.key)
        try:
            if google_crc32c.value(data) != part.crc32c:
                raise StaleTableError(f"is damaged ({part.key})")
            return Segment.read(data)
        except (pa.ArrowException, OSError) as error:
            raise StaleTableError(f"is damaged ({part.key})") from error

    def _bytes(self, key: str) -> bytes:
        try:
            return self.storage.read(key)
        except StoreError as error:
            raise FileNotFoundError(key) from error

    def _look(self, volume_ids: Sequence[str]) -> dict[str, Volume | None]:
        """Return what the commits say of some volumes now."""
        return dict(zip(volume_ids, _at_once(self._live, volume_ids), strict=True))

    def _live(self, volume_id: str) -> Volume | None:
        while keys := live_keys(self.storage.list(f"commits/{volume_id[:2]}/{volume_id}")):
            known = self._looked.get(volume_id)
            if known is not None and known.key == keys[-1]:
                return known
            try:
                found = self._looked[volume_id] = self._volume_of(keys[-1], self.storage.read(keys[-1]))
                return found
            except StoreError:
                if self.storage.exists(keys[-1]):  # else it was removed since it was listed
                    raise
        return None

    def _differing(self, known: Mapping[str, Volume], looked: Mapping[str, object]) -> tuple[list[str], list[str]]:
        """Return the keys of commits that the table knows nothing of, and the ids of volumes that are gone."""
        live = {id_and_generation(key): key for key in live_keys(self.storage.list("commits"))}
        there = {volume_id for volume_id, _ in live}
        new = [
            key
            for (volume_id, generation), key in live.items()
            if volume_id not in looked and (volume_id not in known or known[volume_id].generation != generation)
        ]
        return new, [volume_id for volume_id in known if volume_id not in there and volume_id not in looked]

    def _with(
        self, parts: Sequence[Part], changed: Mapping[str, Volume | None], keys: Sequence[str]
    ) -> tuple[Part, ...]:
        """Write what changed and the commits of ``keys`` as a segment, merged with small ones; return all parts."""
        pieces = list(self._pieces(keys))
        volumes = [volume for volume in changed.values() if volume is not None]
        pieces.append(Segment.of(volumes, [volume_id for volume_id, volume in changed.items() if volume is None]))
        kept, rows = list(parts), sum(map(len, pieces))
        old: list[Part] = []
        while joined := _joined([part.rows for part in kept], rows):
            old = kept[-joined:] + old
            rows += sum(part.rows for part in kept[-joined:])
            del kept[-joined:]
        return (*kept, self._write(merged([*self._segments(old), *pieces], oldest=not kept)))

    def _pieces(self, keys: Sequence[str]) -> Iterator[Segment]:
        """Yield the rows of commits, some at a time: as Python objects they take much more memory than in columns."""
        for at in range(0, len(keys), _READ_AT_ONCE):
            some = keys[at : at + _READ_AT_ONCE]
            try:
                found: list[Volume | None] = [*map(self._volume_of, some, self.storage.read_each(some))]
            except StoreError:  # one was removed since it was listed, or is damaged
                found = _at_once(self._live, [id_and_generation(key)[0] for key in some])
            yield Segment.of([volume for volume in found if volume is not None])

    def _write(self, segment: Segment) -> Part:
        data = segment.to_bytes()
        part = Part(uuid.uuid4().hex, len(segment), google_crc32c.value(data))
        self.storage.put_new(part.key, data)
        return part

    def _publish(self, before: int, parts: Sequence[Part]) -> bool:
        """Have a table count that was made from the manifest of number ``before``; False if another was first."""
        document = {"number": before + 1, "segments": [vars(part) for part in parts]}
        if not self.storage.put_new(_manifest_key(before + 1), sealed(document)):
            self.storage.remove(parts[-1].key)
            return False
        # A slow process may write a number again that was removed long ago: it counts for nothing.
        return self._list().number == before + 1

    def _clear(self, listed: _Listed, looked: Mapping[str, Volume | None], used: Collection[str]) -> None:
        """Remove the marks that the table covers now, and what only tables before the last one needed."""
        doomed = [key for key in listed.marks if self._is_settled(key, looked)]
        for number in listed.manifests[:-1]:
            with suppress(FileNotFoundError, StaleTableError):
                doomed += [part.key for part in self._manifest(number) if part.name not in used]
            doomed.append(_manifest_key(number))
        _at_once(self.storage.remove, doomed)
        self._done.difference_update(doomed)

    def _is_settled(self, key: str, looked: Mapping[str, Volume | None]) -> bool:
        """Return whether a mark announces nothing any more: its commit, or one after it, was there for `_look`.

        Whoever announced it either wrote that commit or found that another one had it; to go on it marks the next.
        """
        found = _MARK.fullmatch(key)
        assert found is not None
        volume = looked.get(found["volume_id"])
        if key in self._done:
            return True
        announced = found["generation"]
        if announced != "gone" and volume is not None and volume.generation >= int(announced):
            return True
        try:
            return time.time() - self.storage.last_change(key) > FORGET_AFTER_SECONDS
        except StoreError:  # another process removed it
            return False


def _manifest_key(number: int) -> str:
    return f"{TABLE}/manifests/{number:08d}.json"


def _joined(sizes: Sequence[int], rows: int) -> int:
    """Return how many segments at the end are merged into a new one of so many rows."""
    if not sizes:
        return 0
    if sizes[-1] < SMALL:
        return 1
    level = _level(rows)
    alike = 0
    while alike < len(sizes) and _level(sizes[-1 - alike]) <= level:
        alike += 1
    return alike if alike >= _FACTOR - 1 else 0


def _level(rows: int) -> int:
    level, limit = 0, SMALL
    while rows >= limit:
        level, limit = level + 1, limit * _FACTOR
    return level


def _at_once(act: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return what ``act`` makes of each, many on their way at once; one alone on this thread."""
    todo = list(items)
    if len(todo) < 2:
        return list(map(act, todo))
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        return list(pool.map(act, todo))
