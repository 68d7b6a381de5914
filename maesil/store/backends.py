"""Which storage a place has: a folder of this machine, or object storage."""

from __future__ import annotations

from pathlib import Path

from maesil.errors import UsageError
from maesil.installed import OBJECTS, not_installed
from maesil.store.local_storage import LocalStorage
from maesil.store.storage import Storage
from maesil.store.urls import StorePlace, place_of


def open_storage(place: str | StorePlace) -> Storage:
    """Return the storage at a path or URL; nothing is asked of it yet. UsageError for a URL that cannot be used."""
    where = place_of(place)
    if isinstance(where, Path):
        return LocalStorage(where)
    if not_installed(OBJECTS):
        raise UsageError(f"{where}: object storage needs the package obstore; pip install 'maesil[objects]'")
    from maesil.store.object_storage import ObjectStorage  # an extra: few machines need it

    return ObjectStorage(where)
