"""Bringing the volumes of a store to the format of today: what is missing is added, and no voxel is written again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from maesil.documents import parsed_json
from maesil.errors import StoreError
from maesil.store.amend import amended
from maesil.store.index import index_is_current, write_index
from maesil.store.ome import OME_VERSION, image_attributes, ome_version
from maesil.store.pyramid import smaller
from maesil.store.reader import StoredPlanes, SuperpatchReader
from maesil.store.records import Volume
from maesil.store.storage import Storage
from maesil.store.store import ZARR_DOCUMENT, Store
from maesil.store.tiles import Attempt
from maesil.store.writer import write_beside


@dataclass(frozen=True)
class Upgraded:
    """What an upgrade did."""

    volumes: int
    """How many got what they lacked."""
    before: int
    """How many had it already."""
    problems: tuple[str, ...]
    """One line for each volume that is damaged, and stays as it is."""


def upgrade(store: Store, on_volume: Callable[[int, int], None] = lambda done, total: None) -> Upgraded:
    """Add to each live volume the metadata and levels that a new one has; may be stopped and started again at will."""
    reader, volumes = SuperpatchReader(store), store.volumes()
    done, problems = 0, []
    store.require_current()
    for number, volume in enumerate(volumes, start=1):
        try:
            if is_current(store.storage, volume):
                continue
            done += amended(store, volume, (ZARR_DOCUMENT,), partial(_write, reader, volume)) is not None
        except StoreError as error:
            problems.append(str(error))
        finally:
            on_volume(number, len(volumes))
    if done or not index_is_current(store):  # also what an upgrade that was stopped left stale
        write_index(store)
    return Upgraded(done, len(volumes) - done - len(problems), tuple(problems))


def is_current(storage: Storage, volume: Volume) -> bool:
    """Return whether a volume's image is one that this version writes; `StoreError` if its metadata is damaged."""
    key = f"{volume.prefix}/{ZARR_DOCUMENT}"
    try:
        return ome_version(parsed_json(storage.read(key))["attributes"]) == OME_VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{storage.root}: {key}: damaged ({error}); run `maesil store verify`") from error


def _write(reader: SuperpatchReader, volume: Volume, prefix: str) -> None:
    """Write the metadata and the levels below level 0 of a volume's new attempt."""
    hu, valid = StoredPlanes(reader, volume), reader.read_map(volume.volume_id, "valid")
    levels = smaller(hu, valid, volume.spacing, np.zeros, slab=volume.tile)
    below = [level for level, _ in levels]
    attributes = image_attributes(volume.volume_id, volume.affine, below, oriented=volume.oriented)
    write_beside(Attempt(reader.storage, prefix, volume.tile, volume.codec), attributes, levels)
