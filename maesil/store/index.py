"""The index of a store: Parquet tables derived from the commits, for queries and for other people's tools."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from maesil.documents import sealed, unsealed
from maesil.errors import StoreError
from maesil.parquet import parquet_metadata, read_parquet, to_parquet
from maesil.store.duplicates import NEW, merge_groups
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.thumbnails import THUMBNAILS_KEY, Thumbnail, thumbnails, thumbnails_table

VOLUMES_KEY = "index/volumes.parquet"
SUPERPATCHES_KEY = "index/superpatches.parquet"
CHECKSUMS_KEY = "index/checksums.json"
_ANEW = "make the index anew with `maesil store index`"
_STATE = b"maesil.live_commits"
_COPIES = b"maesil.copies"
_COPIES_VERSION = b"1"
"""Of the way in which copies are found: what was found in another way is found out anew."""
_OF_SUPERPATCH = ("iz", "iy", "ix", "offset", "length", "crc32c", "valid", "body", "air")
_VOLUMES_AT_ONCE = 4096


def write_index(store: Store) -> tuple[int, int]:
    """Make the tables anew from the live commits; return how many volumes and superpatches they list."""
    store.keep_table()
    volumes = store.volumes()
    while True:
        found = thumbnails(store)
        seen = [volume for volume in volumes if volume.volume_id in found]
        leaders = {volume.group: volume.group for volume in volumes} | _merged([(store, seen, found)])
        superpatches = _superpatch_rows(volumes, leaders)
        state = {_STATE: _state(volumes), _COPIES: _COPIES_VERSION}
        volume_rows = [_volume_row(volume, leaders[volume.group]) for volume in volumes]
        tables = {
            THUMBNAILS_KEY: thumbnails_table(volumes, found),
            VOLUMES_KEY: to_parquet(pa.Table.from_pylist(volume_rows, schema=_VOLUME_SCHEMA.with_metadata(state))),
            SUPERPATCHES_KEY: to_parquet(superpatches.replace_schema_metadata(state)),
        }
        # Tables without checksums are an index that was never finished: nobody reads it, and nothing is damaged.
        if store.storage.exists(CHECKSUMS_KEY):
            store.storage.remove(CHECKSUMS_KEY)
        for key, data in tables.items():
            store.storage.put(key, data)
        store.storage.put(CHECKSUMS_KEY, sealed({key: google_crc32c.value(data) for key, data in tables.items()}))
        # Another process may have committed meanwhile; whoever writes last must have seen everything.
        if _state(volumes := store.volumes()) == state[_STATE]:
            return len(volumes), superpatches.num_rows


def index_problems(store: Store) -> Iterator[str]:
    """Yield one line for each table of the index that is not as it was written; none where there is no whole index.

    An index is whole once its checksums are there: they are written last, and taken away before the tables change.
    """
    if not store.storage.exists(CHECKSUMS_KEY):
        next(store.storage.list("index"), None)  # StoreError for a file in its place
        return
    try:
        for key, crc in unsealed(store.storage.read(CHECKSUMS_KEY)).items():
            if google_crc32c.value(store.storage.read(key)) != crc:
                yield f"{store.path}: {key}: damaged: its checksum is not the one that was noted; {_ANEW}"
    except (StoreError, ValueError) as error:
        yield f"{store.path}: {CHECKSUMS_KEY}: damaged ({error}); {_ANEW}"


def patients(stores: Sequence[Store]) -> dict[str, str]:
    """Return, for each patient group of the stores, the group that stands for it once groups sharing a scan are one."""
    if len(stores) == 1 and index_is_current(stores[0]):
        table = read_parquet(stores[0].storage.read(VOLUMES_KEY)).select(["group", "patient"]).to_pylist()
        return {row["group"]: row["patient"] for row in table}
    return _merged([(store, store.volumes(), thumbnails(store)) for store in stores])


def _merged(stores: Sequence[tuple[Store, Sequence[Volume], Mapping[str, Thumbnail]]]) -> dict[str, str]:
    """Return the leader of each patient group of stores, given the volumes and thumbnails of each.

    What the index of a store says is not found out again: volumes are compared with those that came since.
    """
    groups: list[str] = []
    found: list[Thumbnail] = []
    compared: list[int] = []
    joined: set[tuple[str, str]] = set()
    for number, (store, volumes, of_volume) in enumerate(stores):
        before = _compared_before(store, volumes)
        joined |= {(volume.group, before[volume.volume_id]) for volume in volumes if volume.volume_id in before}
        for volume in volumes:
            groups.append(volume.group)
            found.append(of_volume[volume.volume_id])
            compared.append(number if volume.volume_id in before else NEW)
    return merge_groups(groups, found, compared, joined)


def _compared_before(store: Store, volumes: Sequence[Volume]) -> dict[str, str]:
    """Return the patients of those volumes that were compared with each other, by volume id, as the index says.

    Not of a patient who had a volume that is gone or made anew: that one may have been what joined the others.
    """
    try:
        data = store.storage.read(VOLUMES_KEY)
        whole = unsealed(store.storage.read(CHECKSUMS_KEY))[VOLUMES_KEY] == google_crc32c.value(data)
        if not whole or parquet_metadata(data).get(_COPIES) != _COPIES_VERSION:
            return {}
        rows = read_parquet(data, ["volume_id", "prefix", "group", "patient"]).to_pylist()
    except (StoreError, pa.ArrowException, OSError, ValueError, KeyError):
        return {}
    known = {(volume.volume_id, volume.prefix, volume.group) for volume in volumes}
    changed = {row["patient"] for row in rows if (row["volume_id"], row["prefix"], row["group"]) not in known}
    return {row["volume_id"]: row["patient"] for row in rows if row["patient"] not in changed}


def superpatch_table(store: Store) -> pa.Table:
    """Return the table of superpatches: as it is stored, or made from the commits where that is missing or old."""
    if index_is_current(store):
        return read_parquet(store.storage.read(SUPERPATCHES_KEY))
    volumes, leaders = store.volumes(), patients([store])
    return _superpatch_rows(volumes, leaders)


def index_is_current(store: Store) -> bool:
    """Return whether the tables are there, whole, and made from the commits that are live now."""
    try:
        found = {_stated(store, key) for key in (VOLUMES_KEY, SUPERPATCHES_KEY)}
    except (StoreError, pa.ArrowException, OSError):
        return False
    return found == {_state(store.volumes())} and store.storage.exists(CHECKSUMS_KEY)


def _stated(store: Store, key: str) -> bytes | None:
    metadata = parquet_metadata(store.storage.read(key))
    return metadata.get(_STATE)


def _state(volumes: list[Volume]) -> bytes:
    digest = hashlib.sha256(b"tables 3\n")  # columns, and how copies are found; tables of another version are made anew
    for volume in volumes:
        digest.update(f"{volume.volume_id} {volume.attempt} {volume.generation}\n".encode())
    return digest.hexdigest().encode()


def _fields(kind: pa.DataType, *names: str) -> list[Any]:
    return [pa.field(name, kind, nullable=False) for name in names]


_VOLUME_SCHEMA = pa.schema(
    [
        *_fields(pa.string(), "volume_id", "group", "patient", "prefix", "source_kind", "notes"),
        *_fields(pa.int32(), "shape_z", "shape_y", "shape_x", "superpatches"),
        *_fields(pa.float64(), "spacing_z", "spacing_y", "spacing_x"),
        *_fields(pa.float64(), "source_spacing_z", "source_spacing_y", "source_spacing_x"),
        *_fields(pa.float64(), "hu_mean", "hu_std", "valid", "body"),
    ]
)
_SUPERPATCH_SCHEMA = pa.schema(
    [
        *_fields(pa.string(), "volume_id", "group", "patient", "path", "codec", "source_kind", "notes"),
        *_fields(pa.int32(), "iz", "iy", "ix", "edge"),
        *_fields(pa.int64(), "offset", "length", "crc32c"),
        *_fields(pa.float64(), "valid", "body", "air", "spacing_z", "spacing_y", "spacing_x"),
        *_fields(pa.float64(), "source_spacing_z", "source_spacing_y", "source_spacing_x"),
        *_fields(pa.float64(), "volume_body", "volume_valid", "volume_hu_mean"),
    ]
)


def _volume_row(volume: Volume, patient: str) -> dict[str, Any]:
    return {
        "volume_id": volume.volume_id,
        "group": volume.group,
        "patient": patient,
        "prefix": volume.prefix,
        "source_kind": volume.source["kind"],
        "notes": " ".join(volume.notes),
        "superpatches": volume.count,
        "hu_mean": volume.hu["mean"],
        "hu_std": volume.hu["std"],
        "valid": volume.hu["valid_share"],
        "body": volume.hu["body_share"],
        **_per_axis("shape", volume.shape),
        **_per_axis("spacing", volume.spacing),
        **_per_axis("source_spacing", volume.source_spacing),
    }


def _superpatch_rows(volumes: Sequence[Volume], leaders: Mapping[str, str]) -> pa.Table:
    """Return the rows of all superpatches, column by column: a million of them are too many Python objects."""
    parts = [_rows_of(volumes[at : at + _VOLUMES_AT_ONCE], leaders) for at in range(0, len(volumes), _VOLUMES_AT_ONCE)]
    return pa.concat_tables(parts).combine_chunks() if parts else _SUPERPATCH_SCHEMA.empty_table()


def _rows_of(volumes: Sequence[Volume], leaders: Mapping[str, str]) -> pa.Table:
    of_volume = [_of_volume(volume, leaders[volume.group]) for volume in volumes]
    owner = pa.array(np.repeat(np.arange(len(volumes)), [volume.count for volume in volumes]))
    columns = {
        name: pa.array([row[name] for row in of_volume], _SUPERPATCH_SCHEMA.field(name).type).take(owner)
        for name in of_volume[0]
    }
    columns["path"] = pa.array([path for volume in volumes for path in volume.paths], pa.string())
    for name in _OF_SUPERPATCH:
        values = np.concatenate([volume.column(name) for volume in volumes])
        columns[name] = pa.array(values).cast(_SUPERPATCH_SCHEMA.field(name).type)
    return pa.table([columns[name] for name in _SUPERPATCH_SCHEMA.names], schema=_SUPERPATCH_SCHEMA)


def _of_volume(volume: Volume, patient: str) -> dict[str, Any]:
    """Return what the rows of all superpatches of a volume have in common."""
    return {
        "volume_id": volume.volume_id,
        "group": volume.group,
        "patient": patient,
        "codec": volume.codec,
        "edge": volume.tile,
        "source_kind": volume.source["kind"],
        "notes": " ".join(volume.notes),
        "volume_body": volume.hu["body_share"],
        "volume_valid": volume.hu["valid_share"],
        "volume_hu_mean": volume.hu["mean"],
        **_per_axis("spacing", volume.spacing),
        **_per_axis("source_spacing", volume.source_spacing),
    }


def _per_axis(name: str, values: tuple[Any, Any, Any]) -> dict[str, Any]:
    return {f"{name}_{axis}": value for axis, value in zip("zyx", values, strict=True)}
