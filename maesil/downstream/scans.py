"""What there is to embed: the volumes of a store, or scans as they lie in a folder, one by one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from maesil.config.schema import ModelConfig
from maesil.documents import canonical_json
from maesil.downstream.whole_scan import cells_at
from maesil.progress import Report
from maesil.store.reader import StoredPlanes, SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.store.writer import Image
from maesil.text import written
from maesil.types import Spacing, Zyx

if TYPE_CHECKING:
    from maesil.ingest.plan import VolumePlan


@dataclass(frozen=True)
class Scan:
    """One scan, read when it is its turn."""

    columns: dict[str, str | int]
    """What names it in a table."""
    made_from: str
    """Other where its voxels are others."""
    tile: int
    """Edge of its superpatches (voxels)."""
    read: Callable[[], Image]
    """Raises StoreError, or ScanRefused."""


@dataclass(frozen=True)
class Scans:
    """All scans of one place."""

    scans: list[Scan]
    refused: dict[str, str]
    """Path and code of what was refused before any voxel was read."""
    fingerprint: str | None
    """Of the store, if it is one."""


def scans_of_store(store: Store) -> Scans:
    """Return the volumes of a store, in the order of its ids."""
    reader = SuperpatchReader(store)
    scans = [_of_store(reader, volume) for volume in store.volumes()]
    return Scans(scans, {}, store.fingerprint)


def _of_store(reader: SuperpatchReader, volume: Volume) -> Scan:
    name = volume.volume_id

    def read() -> Image:
        valid, body = (reader.read_map(name, which) for which in ("valid", "body"))
        return Image(StoredPlanes(reader, volume), np.array(volume.affine_lps), valid, body)

    made_from = f"{volume.pixels} {volume.affine_lps}"
    return Scan({"volume_id": name, "group": volume.group}, made_from, volume.tile, read)


def scans_of_files(place: StorePlace, spacing: Spacing | None, config: ModelConfig, report: Report) -> Scans:
    """Return the scans at or below a place, to be read at this spacing (mm; None: their own).

    ScanRefused or NoInputError where there is none.
    """
    # What reads CT is imported where scans are read: a store is embedded without it.
    from maesil.ingest.options import IngestOptions
    from maesil.ingest.planning import scan_and_plan
    from maesil.ingest.read import none_of
    from maesil.ingest.scan import require_no_store_among

    require_no_store_among([place])
    recipe = Recipe(spacing=spacing, superpatch=_tile_for(config))
    plan = scan_and_plan([place], recipe, IngestOptions(workers=0), report)
    if not plan.volumes:
        raise none_of(place, plan)
    scans = [_of_files(number, volume, recipe) for number, volume in enumerate(plan.volumes, start=1)]
    refused = {str(series.paths[0]): series.refusal.code for series in plan.refused}
    damaged = {str(v.path): v.code for v in plan.verdicts if v.status == "quarantined"}
    return Scans(scans, damaged | refused, None)


def _tile_for(config: ModelConfig) -> int:
    """Return the edge of a superpatch that crops fill: that of a store by default, if it can be."""
    usual, least = Recipe().superpatch, math.lcm(*config.crop_zyx)
    return usual if usual % least == 0 else least


def _of_files(number: int, plan: VolumePlan, recipe: Recipe) -> Scan:
    from maesil.ingest.read import read_volume
    from maesil.ingest.source_file import stamp_of

    source = plan.source
    stats = [(str(path), *stamp_of(path)) for path in source.paths]
    told = canonical_json({"files": stats, "planes": source.planes, "recipe": recipe.document()})
    columns: dict[str, str | int] = {"source": written(source.name), "volume": number, "series": plan.series}
    return Scan(columns, hashlib.sha256(told).hexdigest(), recipe.superpatch, lambda: read_volume(plan, recipe))


def superpatches(image: Image, tile: int) -> Iterator[tuple[Zyx, float, float]]:
    """Yield index, and shares of valid and of body voxels (0..1), of each superpatch of a scan, z y x."""
    for iz, iy, ix in product(*(range(-(-n // tile)) for n in image.shape)):
        origin, size = (iz * tile, iy * tile, ix * tile), (tile, tile, tile)
        shares = (float(cells_at(cells, origin, size).mean()) / 255 for cells in (image.valid, image.body))
        valid, body = (round(share, 6) for share in shares)  # as records of a store have them
        yield (iz, iy, ix), valid, body
