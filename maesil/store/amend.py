"""Adding to a volume that is in a store: no voxel is written again, and no file is altered.

A new attempt is made of the files of the live one, under further names, and of what is added; it is committed as any
other. So whoever reads the volume meanwhile goes on, and a process that is killed leaves an attempt that nothing refers
to.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace

from maesil.store.commit import attempt_prefix
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.writer import documents_of


def amended(store: Store, volume: Volume, anew: tuple[str, ...], add: Callable[[str], None]) -> Volume | None:
    """Commit a volume with what ``add`` writes below the key of its new attempt; return it.

    ``anew`` are beginnings of names of files that ``add`` writes in place of the live ones. None if another process has
    committed the volume meanwhile: then nothing was added. An error leaves nothing behind.
    """
    store.require_current()
    storage, attempt = store.storage, uuid.uuid4().hex
    prefix = attempt_prefix(volume.volume_id, attempt)
    names = (key.removeprefix(f"{volume.prefix}/") for key in storage.list(volume.prefix))
    kept = {name for name in names if not name.startswith(anew)}
    try:
        for name in sorted(kept):
            storage.link(f"{volume.prefix}/{name}", f"{prefix}/{name}")
        add(prefix)
        with storage.syncing(prefix):
            added = {name: crc for name, crc in documents_of(storage, prefix).items() if name not in kept}
        # What was kept is vouched for as before: damage of old must not pass for what was committed.
        documents = {name: crc for name, crc in volume.documents.items() if not name.startswith(anew)} | added
        moved = tuple(replace(patch, path=_below(prefix, volume, patch.path)) for patch in volume.superpatches)
        new = replace(volume, attempt=attempt, superpatches=moved, documents=documents)
        new = new.at_generation(volume.generation + 1)
        if store.put_commit(new):
            return new
        storage.remove(prefix)
        return None
    except BaseException:
        if store.live(volume.volume_id) == volume:
            storage.remove(prefix)
        raise


def _below(prefix: str, volume: Volume, key: str) -> str:
    return f"{prefix}/{key.removeprefix(f'{volume.prefix}/')}"
