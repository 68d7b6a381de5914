"""Which volumes of a store are the same scan: resampled, renamed or converted, and so in two patient groups.

A scan that is in the training split under one name and in the test split under another makes every score worthless.
Thumbnails of the body, aligned at its bounding box, are compared, so that neither origin nor spacing matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from maesil.cache.reader import SuperpatchReader
from maesil.commit import Volume
from maesil.types import MAP_CELL

THUMBNAIL_MM = 8.0
SAME_ABOVE = 0.99
"""Correlation above which two thumbnails are of one scan (ours): one scan in two files reached 0.998, others 0.8."""

_TISSUE_ABOVE_HU = -400
_WINDOW = (-1000, 1000)
_LARGEST_SHIFT = 1
_SAME_EXTENT = 2

Thumbnail = NDArray[np.float32]


def merge_groups(volumes: Sequence[tuple[SuperpatchReader, Volume]]) -> dict[str, str]:
    """Return, for each patient group, the group it belongs to once all groups that share a scan are one.

    The volumes, each with its reader, may be of several stores.
    """
    leader = {volume.group: volume.group for _, volume in volumes}

    def lead(group: str) -> str:
        while leader[group] != group:
            group = leader[group]
        return group

    thumbnails = [(volume.group, thumbnail(reader, volume)) for reader, volume in volumes]
    for (one, a), (other, b) in combinations(thumbnails, 2):
        if lead(one) != lead(other) and same_scan(a, b):
            first, second = sorted((lead(one), lead(other)))
            leader[second] = first
    return {group: lead(group) for group in leader}


def thumbnail(reader: SuperpatchReader, volume: Volume) -> Thumbnail:
    """Return the body's bounding box on a grid of about 8 mm: mean windowed HU, float32 ``[z, y, x]``."""
    hu = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    tissue = hu > _TISSUE_ABOVE_HU
    body = reader.read_map(volume.volume_id, "body") > 0
    for axis in range(3):
        body = body.repeat(MAP_CELL, axis=axis)
    tissue &= body[tuple(slice(0, n) for n in volume.shape)]
    if not tissue.any():
        return np.zeros((0, 0, 0), np.float32)
    box = []
    for axis in range(3):
        inside = np.nonzero(tissue.any(axis=tuple(other for other in range(3) if other != axis)))[0]
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    values = np.clip(hu[tuple(box)], *_WINDOW).astype(np.float32)
    for axis, mm in enumerate(volume.spacing):
        values = _averaged(values, axis, THUMBNAIL_MM / mm)
    return values


def same_scan(a: Thumbnail, b: Thumbnail) -> bool:
    """Return whether two thumbnails correlate above `SAME_ABOVE`, shifted against each other by up to one cell."""
    if not a.size or not b.size or np.abs(np.subtract(a.shape, b.shape)).max() > _SAME_EXTENT:
        return False
    steps = range(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1)
    return any(_correlation(a, b, shift) > SAME_ABOVE for shift in product(steps, repeat=3))


def _averaged(values: Thumbnail, axis: int, factor: float) -> Thumbnail:
    """Return means over intervals of ``factor`` voxels along an axis; voxels are shared out between intervals."""
    values = np.moveaxis(values, axis, 0)
    count = max(1, int(values.shape[0] / factor))
    edges = np.minimum(np.arange(count + 1) * factor, values.shape[0])
    total = np.concatenate([np.zeros_like(values[:1], np.float64), np.cumsum(values, axis=0, dtype=np.float64)])
    whole = np.minimum(edges.astype(int), values.shape[0] - 1)
    at_edges = total[whole] + (edges - whole).reshape(-1, *[1] * (values.ndim - 1)) * values[whole]
    means = np.diff(at_edges, axis=0) / np.diff(edges).reshape(-1, *[1] * (values.ndim - 1))
    return np.moveaxis(means.astype(np.float32), 0, axis)


def _correlation(a: Thumbnail, b: Thumbnail, shift: tuple[int, ...]) -> float:
    parts_a, parts_b = [], []
    for n, m, s in zip(a.shape, b.shape, shift, strict=True):
        length = min(n - max(s, 0), m - max(-s, 0))
        if length < 2:
            return 0.0
        parts_a.append(slice(max(s, 0), max(s, 0) + length))
        parts_b.append(slice(max(-s, 0), max(-s, 0) + length))
    x, y = a[tuple(parts_a)].ravel(), b[tuple(parts_b)].ravel()
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
