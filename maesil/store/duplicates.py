"""Which volumes are the same scan: resampled, renamed or converted, and so in two patient groups.

A scan that is in the training split under one name and in the test split under another makes every score worthless.
Thumbnails of the body, aligned at its centre of mass, are compared, so that neither origin nor spacing matters. A
thumbnail is written with its volume; the index holds all of a store in one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from maesil.store.store import Store
from maesil.store.thumbnails import Thumbnail, averaged, thumbnails

SAME_ABOVE = 0.99
"""Correlation above which two thumbnails are of one scan (ours): one scan in two files reached 0.9986, others 0.70."""
_LARGEST_SHIFT = 1
_SAME_EXTENT = 2
_SKETCH = 6
_SKETCH_ABOVE = 0.95
_ROWS_AT_ONCE = 256


def patients(stores: Sequence[Store]) -> dict[str, str]:
    """Return, for each patient group of the stores, the group that stands for it once groups sharing a scan are one."""
    volumes = [volume for store in stores for volume in store.volumes()]
    found = [thumbnail for store in stores for thumbnail in thumbnails(store).values()]
    return merge_groups([volume.group for volume in volumes], found)


def merge_groups(groups: Sequence[str], found: Sequence[Thumbnail]) -> dict[str, str]:
    """Return the leader of each patient group; ``groups`` and ``found`` have an entry a volume."""
    leader = {group: group for group in groups}

    def lead(group: str) -> str:
        while leader[group] != group:
            group = leader[group]
        return group

    for i, j in _alike(found):
        one, other = lead(groups[i]), lead(groups[j])
        if one != other and same_scan(found[i], found[j]):
            first, second = sorted((one, other))
            leader[second] = first
    return {group: lead(group) for group in leader}


def _alike(found: Sequence[Thumbnail]) -> Iterator[tuple[int, int]]:
    """Yield the pairs worth comparing in full: alike in extent, and as sketches of 6^3 cells of the bounding box.

    Sketches are compared by matrix products, so that tens of thousands of volumes take seconds.
    """
    numbers = [n for n, thumbnail in enumerate(found) if thumbnail.size]
    if not numbers:
        return
    sketches = np.stack([_sketch(found[n]) for n in numbers])
    extents = np.array([found[n].shape for n in numbers], dtype=np.int16)
    for start in range(0, len(numbers), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        near = np.abs(extents[rows, None] - extents[None]).max(axis=2) <= _SAME_EXTENT
        for i, j in np.argwhere(near & (sketches[rows] @ sketches.T > _SKETCH_ABOVE)):
            if start + i < j:
                yield numbers[start + i], numbers[j]


def _sketch(thumbnail: Thumbnail) -> NDArray[np.float32]:
    values = averaged(thumbnail, [np.linspace(0, n, _SKETCH + 1) for n in thumbnail.shape]).ravel()
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


def same_scan(a: Thumbnail, b: Thumbnail) -> bool:
    """Return whether two thumbnails correlate above `SAME_ABOVE`, shifted against each other by up to one cell."""
    if not a.size or not b.size or np.abs(np.subtract(a.shape, b.shape)).max() > _SAME_EXTENT:
        return False
    steps = sorted(range(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1), key=abs)  # most copies lie where they lay
    return any(_correlation(a, b, shift) > SAME_ABOVE for shift in product(steps, repeat=3))


def _correlation(a: Thumbnail, b: Thumbnail, shift: tuple[int, ...]) -> float:
    parts_a, parts_b = [], []
    for n, m, s in zip(a.shape, b.shape, shift, strict=True):
        length = min(n - max(s, 0), m - max(-s, 0))
        if length < 2:
            return 0.0
        parts_a.append(slice(max(s, 0), max(s, 0) + length))
        parts_b.append(slice(max(-s, 0), max(-s, 0) + length))
    x, y = (part.astype(np.float64).ravel() for part in (a[tuple(parts_a)], b[tuple(parts_b)]))
    x -= x.mean()
    y -= y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else 0.0
