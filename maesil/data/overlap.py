"""Which scans of a store are known already: another store holds them, or a run has seen them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from maesil.data.known_scans import KnownScan, KnownScans, known_scans, scans_of
from maesil.store.duplicates import copies
from maesil.store.store import Store

_SAME = {"volume_id": "identity", "source_hash": "source", "pixels": "voxels"}
"""What two scans may have in common, surest first, and how it is told."""


@dataclass(frozen=True)
class Overlap:
    """A scan of the store that was asked about, and the scan elsewhere that it is."""

    volume_id: str
    group: str
    where: str
    """The store or the run that holds the other scan."""
    part: str
    """What a run used it for: ``train``, ``validation``, or ``earlier`` (seen by the weights it began with)."""
    known_volume_id: str
    by: str
    """What tells: ``identity``, ``source`` (the same file), ``voxels`` (as stored), or ``thumbnail`` (a copy)."""


@dataclass(frozen=True)
class _Known:
    where: str
    scan: KnownScan


def overlaps(asked: Store, others: Sequence[Store], runs: Sequence[Path]) -> tuple[list[Overlap], tuple[str, ...]]:
    """Return each scan of ``asked`` that other stores hold or runs have seen, and notes on what cannot be compared.

    A scan is named once for each store and run, by the surest sign. Raises StoreError where a store is damaged.
    """
    here = list(scans_of(asked, {}))
    known = [_Known(str(store.path), scan) for store in others for scan in scans_of(store, {})]
    seen: list[KnownScans] = [known_scans([run]) for run in runs]
    for run, kept in zip(runs, seen, strict=True):
        known += [_Known(str(run), scan) for scan in kept.scans]
    found: dict[tuple[str, str], Overlap] = {}
    for scan, other, by in (*_equal(here, known), *_alike(here, known)):
        one = Overlap(scan.volume_id, scan.group, other.where, other.scan.part, other.scan.volume_id, by)
        found.setdefault((scan.volume_id, other.where), one)
    blank = sum(not scan.thumbnail.size for scan in here)
    told = (f"{asked.path}: {blank} of {len(here)} volumes hold no body by which a copy is recognised",) * bool(blank)
    notes = (*told, *(note for kept in seen for note in kept.notes))
    return sorted(found.values(), key=lambda one: (one.volume_id, one.where)), notes


def _equal(here: Sequence[KnownScan], known: Sequence[_Known]) -> Iterator[tuple[KnownScan, _Known, str]]:
    """Yield the scans that share an identity, a source or all voxels."""
    for name, by in _SAME.items():
        holders: dict[str, list[_Known]] = {}
        for one in known:
            holders.setdefault(getattr(one.scan, name), []).append(one)
        for scan in here:
            for one in holders.get(getattr(scan, name), ()):
                yield scan, one, by


def _alike(here: Sequence[KnownScan], known: Sequence[_Known]) -> Iterator[tuple[KnownScan, _Known, str]]:
    """Yield the scans whose thumbnails tell that they are of one scan."""
    first = len(here)
    found = [*(scan.thumbnail for scan in here), *(one.scan.thumbnail for one in known)]
    for pair in copies(found, lambda i, j: (i < first) != (j < first)):
        yield here[min(pair)], known[max(pair) - first], "thumbnail"
