"""What a store holds and no longer needs: attempts that were never committed or were replaced, and torn files.

A running ingest may be about to commit an attempt, and a training run may still read one that was replaced. So only
what nothing has touched for a while goes (`docs/reference/store-format.md`: 24 hours).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from maesil.errors import StoreError
from maesil.store.commit import attempt_prefix, volume_prefix
from maesil.store.records import Volume
from maesil.store.store import Store


@dataclass(frozen=True)
class Garbage:
    """Something that nobody will read any more."""

    key: str
    bytes: int
    why: str
    records: tuple[str, ...] = ()
    """Keys of replaced commits that speak of it; they go first."""


def find_garbage(store: Store, older_than_hours: float = 24.0) -> list[Garbage]:
    """Return what can be removed; StoreError if a commit is damaged, since then nobody knows what it needs."""
    before = time.time() - 3600 * older_than_hours
    return [*_attempts(store, before), *_torn_files(store, before), *_of_tables(store, before)]


def remove_garbage(store: Store, garbage: Garbage) -> None:
    """Remove one piece; whatever ends this half way, the rest is found again."""
    for key in garbage.records:
        store.storage.remove(key)
    store.storage.remove(garbage.key)


def _attempts(store: Store, before: float) -> Iterator[Garbage]:
    live = {volume.volume_id: volume for volume in map(store.read_commit, store.live_commits())}
    for first in store.storage.folders("volumes"):
        for volume_id in store.storage.folders(f"volumes/{first}"):
            yield from _attempts_of(store, volume_id, live.get(volume_id), before)


def _attempts_of(store: Store, volume_id: str, live: Volume | None, before: float) -> Iterator[Garbage]:
    storage, commits = store.storage, f"commits/{volume_id[:2]}"
    # A volume taken out of the store leaves no commit, but its time in the folder.
    committed = storage.last_change(live.key if live else commits) if live or storage.exists(commits) else 0.0
    for attempt in storage.folders(volume_prefix(volume_id)):
        prefix = attempt_prefix(volume_id, attempt)
        if (live and attempt == live.attempt) or max(committed, storage.last_change(prefix)) > before:
            continue
        records = tuple(_records_of(store, volume_id, attempt))
        why = f"replaced by attempt {live.attempt}" if live and records else "no commit refers to it"
        yield Garbage(prefix, sum(map(storage.size, storage.list(prefix))), why, records)


def _records_of(store: Store, volume_id: str, attempt: str) -> Iterator[str]:
    """Yield the keys of a volume's commits that name an attempt; a damaged one names none."""
    for key in store.storage.list(f"commits/{volume_id[:2]}/{volume_id}"):
        with suppress(StoreError):
            if key.endswith(".json") and store.read_commit(key).attempt == attempt:
                yield key


def _torn_files(store: Store, before: float) -> Iterator[Garbage]:
    for key in store.storage.temporaries():
        if store.storage.last_change(key) <= before:
            yield Garbage(key, store.storage.size(key), "left by a process that was killed")


def _of_tables(store: Store, before: float) -> Iterator[Garbage]:
    for key in store.table.leftovers():
        with suppress(StoreError):  # removed by a process that keeps the table
            if store.storage.last_change(key) <= before:
                yield Garbage(key, store.storage.size(key), "no table of volumes names it")
