"""Stores and their patients: who is held out, how HU are normalised, the grid that evaluation goes over.

Everything a step sees is a function of (seed, step, sample), so that a resumed run goes on exactly where it was.
Shapes: B samples, c crop edge (voxels), k = c / 8 cells of the maps, T superpatch edge, t = T / 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maesil.cache.provenance import StoreUse, same_or_grown, use_of
from maesil.cache.ram import ram_readers
from maesil.cache.stage import Stage
from maesil.config.schema import ModelConfig, require_tile
from maesil.errors import NoInputError
from maesil.store.filters import Taken, parse, select
from maesil.store.index import patients, superpatch_table
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.types import Zyx

FAR_READERS = 16
"""Threads that read where a store is far away: each waits for its answer, and several must be on their way."""


def reading_threads(readers: Iterable[SuperpatchReader], asked: int) -> int:
    """Return how many threads are to read: those asked for, or more where a store lies in object storage."""
    far = any(not isinstance(reader.storage.root, Path) for reader in readers)
    return max(asked, FAR_READERS) if far else asked


@dataclass(frozen=True)
class Sources:
    """The stores of a run, in an order that does not depend on how they were named."""

    readers: tuple[SuperpatchReader, ...]
    fingerprints: tuple[str, ...]
    weights: tuple[float, ...] = ()
    """Relative share of the crops that each store gives; empty: by the body it holds."""
    patients: Mapping[str, str] = field(default_factory=dict)
    """For each patient group the one that stands for it: groups that share a scan are one patient."""
    selected: tuple[Taken | None, ...] = ()
    """Of each store the superpatches that a filter takes; None takes all."""
    uses: tuple[StoreUse, ...] = ()
    """What the run is to note of its stores."""
    only: tuple[Set[str] | None, ...] = ()
    """Of each store the ids of the volumes that are used; None uses all."""
    stores: tuple[Store, ...] = ()

    @classmethod
    def open(
        cls,
        paths: Sequence[StorePlace],
        model: ModelConfig,
        *,
        where: str = "",
        weights: Sequence[float] = (),
        ram: int = 0,
        began: Sequence[StoreUse] = (),
        stage: Stage | None = None,
    ) -> Sources:
        """Open stores for crops of ``model``; StoreError, UsageError or NoInputError name the one that fails.

        ``where`` takes some of the superpatches (`maesil.store.filters`); ``weights`` are one a path, or none. Up to
        ``ram`` bytes of superpatches stay in memory once they were read. ``began`` is what a run noted of its stores
        when it began: those that have grown since count as they were then, volumes and order alike. Superpatches are
        read through a ``stage`` on this machine, if there is one.
        """
        if where:
            parse(where)
        given: Sequence[float | None] = weights or [None] * len(paths)
        pairs = zip(map(Store.open, paths), given, strict=True)
        stores, shares = zip(*sorted(pairs, key=lambda pair: pair[0].fingerprint), strict=True)
        for store in stores:
            require_tile(model, store.superpatch, store.path)
        uses = tuple(map(use_of, stores, shares))
        only: tuple[Set[str], ...] = ()
        if began and (order := same_or_grown(began, uses)) is not None:
            stores, shares = (tuple(one[n] for n in order) for one in (stores, shares))
            uses = tuple(replace(old, weight=share) for old, share in zip(began, shares, strict=True))
            only = tuple(old.volumes.keys() for old in began)
        nearer = [stage.over(store.storage) if stage else None for store in stores]
        sources = cls(
            ram_readers(stores, ram, nearer) if ram else tuple(map(SuperpatchReader, stores, nearer)),
            tuple(use.fingerprint for use in uses),
            tuple(share for share in shares if share is not None),
            patients(stores),
            tuple(select(superpatch_table(store), where) if where else None for store in stores),
            uses,
            only,
            tuple(stores),
        )
        if not sources.groups:
            asked = f" that --where {where!r} takes; change it" if where else "; run `maesil ingest` first"
            raise NoInputError(f"{', '.join(map(str, paths))}: no volumes to train on{asked}")
        return sources

    @property
    def groups(self) -> set[str]:
        """All patient groups."""
        return {volume.group for reader in self.readers for volume in self._volumes_of(reader)}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all superpatches that may be read, as they are stored."""
        return sum(int(v.column("length").sum()) for reader in self.readers for v in self._volumes_of(reader))

    @property
    def left_out(self) -> int:
        """How many volumes of the stores came after the run began, and so are not used."""
        return sum(len(reader.volumes) - len(ids) for reader, ids in zip(self.readers, self.only, strict=False) if ids)

    def volumes(self, groups: Iterable[str]) -> Iterator[tuple[SuperpatchReader, Volume]]:
        """Yield the volumes of these patient groups, each with its reader, in a fixed order.

        Where there is a filter they hold only the superpatches it takes, and those without any are left out.
        """
        wanted = set(groups)
        for reader in self.readers:
            yield from ((reader, volume) for volume in self._volumes_of(reader) if volume.group in wanted)

    def takes(self, reader: SuperpatchReader, volume: Volume, index: Zyx) -> bool:
        """Return whether the filter takes a superpatch."""
        selected = self.selected[self.readers.index(reader)] if self.selected else None
        return selected is None or (volume.volume_id, index) in selected

    def _volumes_of(self, reader: SuperpatchReader) -> Iterator[Volume]:
        number = self.readers.index(reader)
        selected = self.selected[number] if self.selected else None
        only = self.only[number] if self.only else None
        for _, volume in sorted(reader.volumes.items()):
            if only is not None and volume.volume_id not in only:
                continue
            if selected is not None:
                if volume.volume_id not in selected.volumes:
                    continue
                volume = selected.part(volume)
            if volume.count:
                yield volume

    def by_weight(self, stores: NDArray[np.intp], weights: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the weights of superpatches, scaled so that each store has its own share where shares are given.

        ``stores`` are the numbers of their readers.
        """
        scaled = weights.astype(np.float64)
        for number, weight in enumerate(self.weights):
            of_store = stores == number
            scaled[of_store] *= weight / (scaled[of_store].sum() or 1)
        return scaled
