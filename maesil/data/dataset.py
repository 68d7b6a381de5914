"""The superpatches of a store as a PyTorch data set, for other people's trainers.

maesil's own trainer reads faster, into reused buffers (`maesil.data.loader.CropLoader`); this one fits anything that
takes a ``torch.utils.data.Dataset``. Shapes: T superpatch edge (voxels), t = T / 8 cells of the maps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maesil.data.crops import blank_outside_scan
from maesil.documents import read_json
from maesil.errors import StoreError, UsageError
from maesil.store.filters import filtered, parse
from maesil.store.index import index_is_current, superpatch_table
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.store.urls import place_of


class Item(TypedDict):
    """One superpatch; T voxels along each edge, t cells."""

    hu: Tensor
    """int16 HU ``[T, T, T]`` (z y x); -1024 outside the scan."""
    valid: Tensor
    """uint8 ``[t, t, t]``: share (0..255) of each 8^3 cell inside the scan."""
    body: Tensor
    """uint8 ``[t, t, t]``: its share inside the body."""
    volume_id: str
    group: str
    """The patient group."""
    index: Tensor
    """int64 ``[3]``: z, y, x on the grid of superpatches."""
    spacing: Tensor
    """float64 ``[3]``: z, y, x (mm)."""


class SuperpatchDataset(Dataset[Item]):
    """One item a superpatch of a store, in a fixed order; pickles, and works with workers under fork and spawn.

    An item is a dictionary, see `Item`. ``transform`` is called with it, and what it returns is the item.

    ``where`` chooses superpatches as ``maesil train --where`` does: ``"body > 0.3 and spacing_z <= 2"``, or any
    `pyarrow.compute` expression over the same columns. ``split`` is a file and one of its parts,
    ``("run/split.json", "train")``: patients of other parts are left out. Raises StoreError (no store, a stale index,
    damage at the item that meets it) and UsageError.
    """

    def __init__(
        self,
        store: Path | str,
        *,
        where: str | pc.Expression | None = None,
        split: tuple[Path | str, str] | None = None,
        transform: Callable[[Item], Any] | None = None,
    ) -> None:
        # Absolute: the working directory may change before an item is read.
        self.path, self.transform = place_of(store).absolute(), transform
        opened = Store.open(self.path)
        if not index_is_current(opened):
            raise StoreError(f"{store}: its index is missing or stale; run `maesil store index {store}`")
        self.fingerprint = opened.fingerprint
        table = superpatch_table(opened)
        if not isinstance(where, str | pc.Expression | None):
            raise UsageError(f"where: expected a filter as text or a pyarrow.compute expression, found {where!r}")
        for condition in (parse(where) if isinstance(where, str) else where, _of_split(split)):
            if condition is not None:
                table = _filtered(table, condition)
        # Plain arrays: Arrow's threads do not survive a fork, and a list of rows would be copied by each worker.
        self._volume_ids = np.array(table["volume_id"].to_pylist(), dtype="U32")
        self._index = np.stack([table[name].to_numpy() for name in ("iz", "iy", "ix")], axis=1)
        self._reader: SuperpatchReader | None = None
        self._reader_of = 0

    def __repr__(self) -> str:
        return f"SuperpatchDataset({str(self.path)!r}, superpatches={len(self)})"

    def __len__(self) -> int:
        return len(self._volume_ids)

    def __getitem__(self, item: int) -> Any:
        reader = self._open_reader()
        volume = reader.volumes[str(self._volume_ids[item])]
        iz, iy, ix = (int(i) for i in self._index[item])
        start, size = (iz * volume.tile, iy * volume.tile, ix * volume.tile), (volume.tile,) * 3
        hu = reader.read_superpatch(volume.volume_id, (iz, iy, ix))
        valid, body = (reader.read_map_region(volume.volume_id, name, start, size) for name in ("valid", "body"))
        blank_outside_scan(hu, valid)
        found: Item = {
            "hu": torch.from_numpy(hu),
            "valid": torch.from_numpy(valid),
            "body": torch.from_numpy(body),
            "volume_id": volume.volume_id,
            "group": volume.group,
            "index": torch.tensor([iz, iy, ix]),
            "spacing": torch.tensor(volume.spacing, dtype=torch.float64),
        }
        return self.transform(found) if self.transform else found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def _open_reader(self) -> SuperpatchReader:
        """Return this process's own reader: locks and threads of a parent are no use after a fork."""
        if self._reader is None or self._reader_of != os.getpid():
            store = Store.open(self.path)
            if store.fingerprint != self.fingerprint:
                raise StoreError(f"{self.path}: the store changed since the data set was made; make it anew")
            self._reader, self._reader_of = SuperpatchReader(store), os.getpid()
        return self._reader


def _filtered(table: pa.Table, condition: pc.Expression) -> pa.Table:
    try:
        return filtered(table, condition)
    except pa.ArrowException as error:
        raise UsageError(f"where: expected columns compared with values of their type, found {condition}") from error


def _of_split(split: tuple[Path | str, str] | None) -> pc.Expression | None:
    if split is None:
        return None
    if isinstance(split, str | Path) or len(split) != 2:
        raise UsageError(f'split: expected a file and one of its parts, ("run/split.json", "train"), found {split!r}')
    path, part = Path(split[0]), split[1]
    try:
        groups = read_json(path)[part]
    except (OSError, KeyError) as error:
        raise UsageError(
            f"{path}: expected a split file with a part {part!r} (train, validation, test): {error!r}"
        ) from None
    return pc.field("group").isin(pa.array(groups, pa.string()))
