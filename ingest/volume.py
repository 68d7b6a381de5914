"""One volume from source to store: read, check, turn, resample, map, write. What a worker does.

Each function is idempotent, since Dask runs a task again when a worker is lost.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.commit import Volume
from maesil.errors import Refused
from maesil.geometry import spacing_of
from maesil.ingest.dicom import pixel_digest, read_slices_hu
from maesil.ingest.maps import body_map, valid_map
from maesil.ingest.nifti import read_nifti
from maesil.ingest.plan import Source
from maesil.ingest.plausible import check_plausible, without_undeclared_padding
from maesil.ingest.resample import to_canonical, to_grid
from maesil.ingest.scanned import Scanned
from maesil.ingest.tile import Image, write_attempt
from maesil.recipe import Recipe
from maesil.storage import Storage
from maesil.types import AIR_HU, MAP_CELL, HuArray, MapArray

_HISTOGRAM_OFFSET = 1 << 15


@dataclass(frozen=True)
class BuildOrder:
    """What to make of a source, and under which (already hashed) identities."""

    store: Path
    recipe: Recipe
    volume_id: str
    group: str
    source_hash: str
    source_path: str
    threads: int = 1


def source_hash(source: Source) -> str:
    """Return a SHA-256 (hex) over all that decides the voxels: a rename changes nothing, one edited pixel does."""
    digest = hashlib.sha256()
    if source.kind == "slices":
        for path in source.paths:
            digest.update(pixel_digest(path))
        digest.update(_order_of(source))
    else:
        scan = read(source)
        digest.update(str(scan.shape).encode())
        digest.update(np.ascontiguousarray(scan.affine).tobytes())
        digest.update(scan.hu.tobytes())
        digest.update(scan.valid.tobytes())
    return digest.hexdigest()


def read(source: Source) -> Scanned:
    """Decode a source to HU on its own grid; `Refused` with a code if it cannot be trusted."""
    if source.kind == "nifti":
        return read_nifti(source.paths[0], prefer=source.prefer)
    return _read_slices(source)


def build(source: Source, order: BuildOrder) -> Volume:
    """Make one volume and write it as an attempt; return its commit record, which is not committed yet."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(order.threads)
    scan = without_undeclared_padding(read(source))
    check_plausible(scan.hu, scan.valid)
    canonical = to_canonical(scan)
    final = to_grid(canonical, order.recipe.spacing)
    hu, clipped = _to_int16(final.hu, final.known, order.recipe.hu_range)
    valid = valid_map(final.valid)
    spacing = spacing_of(final.affine)
    image = Image(hu=hu, affine=final.affine, valid=valid, body=body_map(hu, valid, spacing))
    attempt = uuid.uuid4().hex
    record = Volume(
        volume_id=order.volume_id,
        group=order.group,
        attempt=attempt,
        source_hash=order.source_hash,
        recipe_hash=order.recipe.hash,
        source_path=order.source_path,
        shape=image.shape,
        affine_lps=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in final.affine),
        spacing=spacing,
        source_shape=canonical.shape,
        source_spacing=spacing_of(canonical.affine),
        tile=order.recipe.superpatch,
        codec=order.recipe.codec,
        source=final.source,
        hu=_statistics(hu, final.valid, image.body) | clipped,
        notes=tuple(sorted({*source.notes, *final.notes})),
    )
    storage = Storage(order.store)
    patches = write_attempt(storage, order.volume_id, attempt, image, tile=record.tile, codec=record.codec)
    return replace(record, superpatches=patches)


def _order_of(source: Source) -> bytes:
    """Return what of a plan decides the voxels beside the files: nothing for a plain stack of single slices."""
    plain = tuple((n, None) for n in range(len(source.paths)))
    return b"" if source.planes == plain else repr(source.planes).encode()


def _read_slices(source: Source) -> Scanned:
    there = [z for z, plane in enumerate(source.planes) if plane is not None]
    slices = read_slices_hu((source.paths[n], frame) for n, frame in filter(None, source.planes))
    first = next(slices)
    hu = np.empty((len(source.planes), *first.hu.shape), dtype=np.float32)
    valid = np.zeros(hu.shape, dtype=bool)
    notes: set[str] = set()
    for z, found in zip(there, chain([first], slices), strict=True):
        if found.hu.shape != first.hu.shape:
            raise Refused(
                "bad_pixels", f"slice {z} has another size than the first: {found.hu.shape}, {first.hu.shape}"
            )
        hu[z], valid[z] = found.hu, found.valid
        notes |= found.notes
    assert source.affine is not None
    scan = Scanned(hu, valid, source.affine, tuple(sorted(notes)), source.technical)
    return scan if len(there) == len(hu) else replace(scan, filled=_fill_missing(scan, there))


def _fill_missing(scan: Scanned, there: Sequence[int]) -> NDArray[np.bool_]:
    """Interpolate the slices between those that are there, linearly; return which voxels were filled so."""
    filled = np.zeros(scan.hu.shape, dtype=bool)
    for below, above in pairwise(there):
        for z in range(below + 1, above):
            share = np.float32((z - below) / (above - below))
            scan.hu[z] = (1 - share) * scan.hu[below] + share * scan.hu[above]
            filled[z] = scan.valid[below] & scan.valid[above]
    return filled


def _to_int16(
    hu: NDArray[np.float32], valid: NDArray[np.bool_], hu_range: tuple[int, int]
) -> tuple[HuArray, dict[str, float]]:
    """Round once and clip; return the voxels and the shares of valid ones that the clip moved."""
    low, high = hu_range
    rounded = np.rint(hu)
    count = max(1, int(valid.sum()))
    clipped = {
        "clipped_low_share": float(((rounded < low) & valid).sum() / count),
        "clipped_high_share": float(((rounded > high) & valid).sum() / count),
    }
    out = np.clip(rounded, low, high).astype(np.int16)
    out[~valid] = AIR_HU
    return np.ascontiguousarray(out), clipped


def _statistics(hu: HuArray, valid: NDArray[np.bool_], body: MapArray) -> dict[str, float]:
    """Return exact statistics of the valid voxels, and the shares of valid and body voxels in the volume."""
    counts = np.bincount(hu[valid].astype(np.int32) + _HISTOGRAM_OFFSET)  # int16 has few values: no sorting needed
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
    return statistics | {"valid_share": total / hu.size, "body_share": body_voxels / hu.size}
