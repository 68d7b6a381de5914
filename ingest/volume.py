"""One volume from source to store: read, check, turn, resample, map, write. What a worker does.

Each function is idempotent, since Dask runs a task again when a worker is lost.
"""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from maesil.errors import Refused
from maesil.geometry import spacing_of
from maesil.ingest import isolated
from maesil.ingest.decode import with_missing_slices
from maesil.ingest.maps import body_map, valid_map
from maesil.ingest.planes import scratch_folder, zeros
from maesil.ingest.plausible import plausible
from maesil.ingest.resample import OnGrid, on_grid, to_canonical
from maesil.ingest.source import Source
from maesil.store.backends import open_storage
from maesil.store.recipe import REFUSABLE, Recipe
from maesil.store.records import Technical, Volume
from maesil.store.urls import StorePlace
from maesil.store.writer import Image, write_attempt
from maesil.types import AIR_HU, MAP_CELL, MapArray, Planes, Spacing, Zyx

_HISTOGRAM_OFFSET = 1 << 15
_BYTES_OF_A_PROCESS = 300 << 20
_COPIES = 5
_SLICES = 160


@dataclass(frozen=True)
class BuildOrder:
    """What to make of a source, and under which (already hashed) identities."""

    store: StorePlace
    recipe: Recipe
    volume_id: str
    group: str
    source_hash: str
    """Empty: to be made while reading."""
    source_path: str
    threads: int = 1


def task_bytes(source: Source) -> int:
    """Return about how much memory building a volume takes: that of its voxels, or of a slab, several times over."""
    if source.is_long:
        return _BYTES_OF_A_PROCESS + _SLICES * source.slice_bytes
    return _BYTES_OF_A_PROCESS + _COPIES * source.decoded_bytes


@dataclass(frozen=True)
class Made:
    """A volume as a store will hold it, and what its record says of where it came from."""

    image: Image
    source_hash: str
    source_shape: Zyx
    source_spacing: Spacing
    source: Technical
    hu: dict[str, float]
    notes: tuple[str, ...]


def make(source: Source, recipe: Recipe, folder: Path, *, threads: int = 1, source_hash: str = "") -> Made:
    """Read, check, turn, resample and map one volume; `Refused` with a code.

    The voxels of a long volume lie in temporary files in ``folder``. ``source_hash`` is the known one, or empty: then
    it is made while reading.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    read, source_hash = isolated.read_hashed(source, source_hash, folder)
    scan = plausible(with_missing_slices(read, source), recipe.accept)
    notes = {*source.notes, *scan.notes}
    if unwanted := [note for note in REFUSABLE if note in recipe.refuse and note in notes]:
        raise Refused(unwanted[0], "refused on request (--refuse)")
    canonical = to_canonical(scan)
    final = on_grid(canonical, recipe.spacing)
    hu, measured, clipped = _to_int16(final, recipe.hu_range, folder)
    valid = valid_map(measured)
    body = body_map(hu, valid, spacing_of(final.affine))
    return Made(
        image=Image(hu=hu, affine=final.affine, valid=valid, body=body),
        source_hash=source_hash,
        source_shape=canonical.shape,
        source_spacing=spacing_of(canonical.affine),
        source=canonical.source,
        hu=_statistics(hu, measured, body) | clipped,
        notes=tuple(sorted({*source.notes, *final.notes})),
    )


def build(source: Source, order: BuildOrder) -> Volume:
    """Make one volume and write it as an attempt; return its commit record, which is not committed yet."""
    scratch = scratch_folder(order.store)
    made = make(source, order.recipe, scratch, threads=order.threads, source_hash=order.source_hash)
    record = _record(made, order, attempt=uuid.uuid4().hex)
    patches, documents = write_attempt(
        open_storage(order.store),
        order.volume_id,
        record.attempt,
        made.image,
        tile=record.tile,
        codec=record.codec,
        oriented=record.oriented,
        room=partial(zeros, folder=scratch),
        threads=order.threads,
    )
    return replace(record, superpatches=patches, documents=documents)


def _record(made: Made, order: BuildOrder, attempt: str) -> Volume:
    """Return what is known of a volume before it is written."""
    return Volume(
        volume_id=order.volume_id,
        group=order.group,
        attempt=attempt,
        source_hash=made.source_hash,
        recipe_hash=order.recipe.hash,
        source_path=order.source_path,
        shape=made.image.shape,
        affine_lps=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in made.image.affine),
        spacing=spacing_of(made.image.affine),
        source_shape=made.source_shape,
        source_spacing=made.source_spacing,
        tile=order.recipe.superpatch,
        codec=order.recipe.codec,
        source=made.source,
        hu=made.hu,
        notes=made.notes,
    )


def _to_int16(final: OnGrid, hu_range: tuple[int, int], folder: Path) -> tuple[Planes, Planes, dict[str, float]]:
    """Round once and clip; return the voxels, which are measured, and the shares of known ones that the clip moved."""
    low, high = hu_range
    hu, measured = zeros(final.shape, np.int16, folder), zeros(final.shape, bool, folder)
    count = below = above = 0
    planes = (plane for slab in final.slabs() for plane in zip(slab.hu, slab.known, slab.valid, strict=True))
    for z, (plane, inside, valid) in enumerate(planes):  # a plane stays in the processor's cache
        rounded = np.rint(plane)
        if not inside.all():
            rounded[~inside] = AIR_HU
        count += int(np.count_nonzero(inside))
        below += int(np.count_nonzero(inside & (rounded < low)))
        above += int(np.count_nonzero(inside & (rounded > high)))
        clipped = np.clip(rounded, low, high, out=rounded).astype(np.int16)
        clipped[~inside] = AIR_HU
        hu[z], measured[z] = clipped, valid
    count = max(1, count)
    return hu, measured, {"clipped_low_share": below / count, "clipped_high_share": above / count}


def _statistics(hu: Planes, valid: Planes, body: MapArray) -> dict[str, float]:
    """Return exact statistics of the valid voxels, and the shares of valid and body voxels in the volume."""
    counts = np.zeros(2 * _HISTOGRAM_OFFSET, dtype=np.int64)  # int16 has few values: no sorting needed
    for plane, inside in zip(hu, valid, strict=True):
        voxels = plane if inside.all() else plane[inside]
        counts += np.bincount(voxels.ravel().astype(np.int64) + _HISTOGRAM_OFFSET, minlength=len(counts))
    total = int(counts.sum())
    if not total:
        raise Refused("nothing_valid", "every voxel is padding")
    values = np.arange(len(counts), dtype=np.float64) - _HISTOGRAM_OFFSET
    below = np.cumsum(counts)
    at = {"min": 1, "p01": 0.01 * total, "median": 0.5 * total, "p99": 0.99 * total, "max": total}
    statistics = {name: float(values[np.searchsorted(below, rank)]) for name, rank in at.items()}
    mean = float((counts * values).sum() / total)
    statistics |= {"mean": mean, "std": float(np.sqrt((counts * (values - mean) ** 2).sum() / total))}
    body_voxels = float(body.sum(dtype=np.int64)) / 255 * MAP_CELL**3
    size = math.prod(hu.shape)
    return statistics | {"valid_share": total / size, "body_share": body_voxels / size}
