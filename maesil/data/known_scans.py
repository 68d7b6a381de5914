"""What a run keeps to recognise its scans by, wherever its stores went: ``RUN/scans.parquet``.

A patient counts as known if a volume of theirs has the identity, the source or the pixels of a scan of the run, or
looks like one (`maesil.store.duplicates`). What could not be compared is said in notes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from maesil.data.split import Split
from maesil.errors import StoreError
from maesil.files import write_whole
from maesil.parquet import read_parquet, to_parquet
from maesil.store.duplicates import merge_groups
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.thumbnails import Thumbnail, thumbnails
from maesil.text import counted

SCANS = "scans.parquet"
EARLIER = "earlier"
"""The part of scans that the weights saw before the run began (``--init-from``)."""
_TEXTS = ("volume_id", "group", "part", "source_hash", "pixels")
_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in _TEXTS),
        *(pa.field(name, pa.int32(), nullable=False) for name in "zyx"),
        pa.field("values", pa.binary(), nullable=False),
    ]
)


@dataclass(frozen=True)
class KnownScan:
    """One volume, as far as it takes to know it again."""

    volume_id: str
    group: str
    part: str
    """Of the run: ``train``, ``validation``, or ``earlier``; empty for a volume of another store."""
    source_hash: str
    pixels: str
    """Hash of what volumes of the very same stored voxels share."""
    thumbnail: Thumbnail = field(repr=False)


@dataclass(frozen=True)
class KnownScans:
    """The scans that one or more runs have seen."""

    scans: tuple[KnownScan, ...]
    notes: tuple[str, ...] = ()
    """What cannot be checked, a line each."""

    def groups(self, *parts: str) -> set[str]:
        """Return the patient groups of some parts."""
        return {scan.group for scan in self.scans if scan.part in parts}

    def patients(self, store: Store) -> tuple[dict[str, str], tuple[str, ...]]:
        """Return, for each group of the store and of these scans, the one that stands for its patient; and notes."""
        here = tuple(scans_of(store, {}))
        everything = (*here, *self.scans)
        leaders = merge_groups([scan.group for scan in everything], [scan.thumbnail for scan in everything])
        for name in ("volume_id", "source_hash", "pixels"):
            leaders = _joined(leaders, here, self.scans, name)
        blank = sum(not scan.thumbnail.size for scan in here)
        blank_ones = f"{blank} of {counted(len(here), 'volume')}"
        told = f"{store.path}: no body by which a copy of a scan is recognised in {blank_ones}"
        return leaders, (*self.notes, *((told,) if blank else ()))


def same_patients(leaders: Mapping[str, str], groups: Iterable[str]) -> set[str]:
    """Return all patient groups of the patients that some groups are of."""
    patients = {leaders[group] for group in groups if group in leaders}
    return {group for group, leader in leaders.items() if leader in patients}


def scans_of(store: Store, part_of: Mapping[str, str]) -> Iterator[KnownScan]:
    """Yield what the volumes of a store are recognised by; of the groups in ``part_of`` if there are any."""
    found = thumbnails(store)
    for volume in store.volumes():
        if not part_of or volume.group in part_of:
            part = part_of.get(volume.group, "")
            pixels = _pixels(volume)
            yield KnownScan(volume.volume_id, volume.group, part, volume.source_hash, pixels, found[volume.volume_id])


def record_scans(run_dir: Path, stores: Sequence[Store], split: Split, earlier: Sequence[KnownScan] = ()) -> None:
    """Write ``RUN/scans.parquet``: the scans that are trained and validated on, and those the weights saw before."""
    part_of = {group: part for part in ("train", "validation") for group in getattr(split, part)}
    scans = [*(scan for store in stores if part_of for scan in scans_of(store, part_of)), *earlier]
    rows = [
        {
            **{name: getattr(scan, name) for name in _TEXTS},
            **dict(zip("zyx", scan.thumbnail.shape, strict=True)),
            "values": scan.thumbnail.tobytes(),
        }
        for scan in scans
    ]
    write_whole(run_dir / SCANS, to_parquet(pa.Table.from_pylist(rows, schema=_SCHEMA)))


def known_scans(run_dirs: Sequence[Path]) -> KnownScans:
    """Return the scans that runs have seen; a note for each run that kept nothing to recognise them by."""
    scans: list[KnownScan] = []
    notes: list[str] = []
    for run_dir in run_dirs:
        found = read_scans(run_dir)
        scans += found or ()
        if found is None:
            notes.append(
                f"{run_dir} keeps nothing to recognise its scans by ({SCANS} is missing or damaged): copies of them "
                "under other names would be scored as new patients"
            )
        elif blank := sum(not scan.thumbnail.size for scan in found):
            notes.append(
                f"{run_dir}: no body in {blank} of {counted(len(found), 'scan')}, so only exact copies are recognised"
            )
    return KnownScans(tuple(scans), tuple(notes))


def read_scans(run_dir: Path) -> tuple[KnownScan, ...] | None:
    """Return the scans that a run has seen, None where it keeps none or the file is damaged."""
    try:
        rows = read_parquet((run_dir / SCANS).read_bytes()).select(_SCHEMA.names).cast(_SCHEMA).to_pylist()
        return tuple(
            KnownScan(
                **{name: row[name] for name in _TEXTS},
                thumbnail=np.frombuffer(row["values"], np.uint8).reshape([row[axis] for axis in "zyx"]),
            )
            for row in rows
        )
    except (StoreError, pa.ArrowException, OSError, KeyError, ValueError):
        return None


def _pixels(volume: Volume) -> str:
    return hashlib.sha256(repr(volume.pixels).encode()).hexdigest()


def _joined(
    leaders: dict[str, str], some: Sequence[KnownScan], others: Sequence[KnownScan], name: str
) -> dict[str, str]:
    """Return the leaders once groups with scans of an equal value are one patient."""
    group_of = {getattr(scan, name): scan.group for scan in others}
    for scan in some:
        one, other = leaders[scan.group], leaders[group_of.get(getattr(scan, name), scan.group)]
        if one != other:
            first, second = sorted((one, other))
            leaders = {group: first if leader == second else leader for group, leader in leaders.items()}
    return leaders
