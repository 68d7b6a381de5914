"""Which volumes are the same scan: resampled, renamed, converted, cut, mirrored or clipped, in two patient groups.

A scan that is in the training split under one name and in the test split under another makes every score worthless.
Thumbnails of the body are compared in two steps. A fingerprint of the smaller one's centre is looked for around the
centre of the larger one, mirrored in every way: matrix products do that for thousands of volumes. Where the
fingerprints agree, the cells that show tissue in both are correlated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from maesil.store.thumbnails import Thumbnail, thumbnail_value

SAME_ABOVE = 0.965
"""Correlation above which two thumbnails are of one scan (ours); measured in docs/explanation/same-scan.md."""
CLIPPED_SAME_ABOVE = 0.95
"""The same where one holds a much narrower range of values: the mean of clipped voxels is no clipped mean."""
SMALL_SAME_ABOVE = 0.99
"""The same for bodies of fewer than `_FEW` cells, of which many look alike."""

_BLOCK = (8, 12, 12)
"""Cells of the block that a fingerprint describes: 64 x 96 x 96 mm."""
_WAVES = 4
"""Cosines along each axis of a fingerprint."""
_FINGERPRINTS_ABOVE = 0.88
_LOST = 0.2
"""Share of a body's length that a copy may lack at one end; its centre then lies half of that away."""
_LEAST_LENGTH = 0.6
"""Shares of the larger body's length that the smaller one has along each axis, give or take a cell."""
_HOPELESS = 0.5
"""Correlation at the guessed shift below which no better shift is looked for."""
_FINER_ABOVE = 0.8
"""Correlation at the best whole cell below which parts of a cell are not tried: copies of real scans have 0.88."""
_FEW = 1000
_NARROW = 0.6
"""Share of a range of values below which another one was clipped."""
_COMMON = 0.6
"""Share of the smaller body's tissue that must lie in the larger one."""
_SOFT_TISSUE = (round(thumbnail_value(-160)), round(thumbnail_value(240)))
"""Fingerprints see this window alone: copies are often clipped to it."""
_TISSUE_STEPS = 4
"""A cell shows tissue that lies this far above the least value which both thumbnails can hold."""
_NO_SPREAD = 1e-2
"""Values are whole numbers, their halves and quarters: what spreads less is one value, and rounding."""
_AT_ONCE = 256
"""Volumes compared with one at a time: their agreements, 7 MB, mostly stay in the processor's cache."""

NEW = -1
"""Number of a thumbnail that was compared with no other one yet."""

Field = NDArray[np.float32]
Cells = tuple[int, int, int]
MIRRORS: tuple[Cells, ...] = tuple(product((1, -1), repeat=3))  # type: ignore[arg-type]
"""Steps along z, y and x: -1 mirrors an axis."""


def merge_groups(
    groups: Sequence[str],
    found: Sequence[Thumbnail],
    compared: Sequence[int] = (),
    joined: Iterable[tuple[str, str]] = (),
) -> dict[str, str]:
    """Return the leader of each patient group; ``groups`` and ``found`` have an entry per volume.

    A scan that a group holds twice is compared once: a run keeps the thumbnails of the very store that is scored.
    ``compared`` is as in `copies`; ``joined`` are the groups that came out as one patient when those were compared.
    """
    numbers = compared or [NEW] * len(found)
    distinct: dict[tuple[object, ...], tuple[Thumbnail, int]] = {}
    for group, one, number in zip(groups, found, numbers, strict=True):
        distinct.setdefault((group, one.shape, one.tobytes(), number), (one, number))
    leader = {group: group for group in groups}

    def lead(group: str) -> str:
        while leader[group] != group:
            group = leader[group]
        return group

    def join(one: str, other: str) -> None:
        first, second = sorted((lead(one), lead(other)))
        leader[second] = first

    for group, patient in joined:
        join(group, patient)
    owners = [str(group) for group, *_ in distinct]
    thumbnails, numbers = [one for one, _ in distinct.values()], [number for _, number in distinct.values()]
    for i, j in copies(thumbnails, lambda i, j: lead(owners[i]) != lead(owners[j]), numbers):
        join(owners[i], owners[j])
    return {group: lead(group) for group in leader}


def copies(
    found: Sequence[Thumbnail], asked: Callable[[int, int], bool], compared: Sequence[int] = ()
) -> Iterator[tuple[int, int]]:
    """Yield the numbers of each two thumbnails that are of one scan; ``asked`` says whether a pair matters.

    Thumbnails with the same number in ``compared`` were compared with each other before, and are not again; those with
    `NEW` were compared with none.
    """
    for guess in _guesses(found, np.array(compared or [NEW] * len(found), dtype=np.int64)):
        if asked(guess.larger, guess.smaller):
            larger, smaller = found[guess.larger], found[guess.smaller]
            if _correlation_near(larger, smaller, guess) > _enough(larger, smaller):
                yield guess.larger, guess.smaller


def _enough(larger: Thumbnail, smaller: Thumbnail) -> float:
    """Return the correlation above which two thumbnails are of one scan."""
    if smaller.size < _FEW:
        return SMALL_SAME_ABOVE
    ranges = sorted(int(np.ptp(one)) for one in (larger, smaller))
    return CLIPPED_SAME_ABOVE if ranges[0] < _NARROW * ranges[1] else SAME_ABOVE


def same_scan(a: Thumbnail, b: Thumbnail) -> bool:
    """Return whether two thumbnails are of one scan, or of one scan and a cut, mirrored or clipped copy of it."""
    return any(copies((a, b), lambda i, j: True))


@dataclass(frozen=True)
class _Guess:
    """Two volumes that may be one scan, and how the smaller lies in the larger."""

    larger: int
    smaller: int
    mirror: Cells
    shift: Cells
    """Cell of the larger thumbnail at which the first cell of the mirrored smaller one lies."""


def _guesses(found: Sequence[Thumbnail], compared: NDArray[np.int64]) -> Iterator[_Guess]:
    """Yield the pairs whose fingerprints agree, each with the mirror and the shift at which they agree best."""
    numbers = sorted((n for n, thumbnail in enumerate(found) if thumbnail.size), key=lambda n: (found[n].size, n))
    centres = [_fingerprints(found[n], 0.0) for n in numbers]
    if not centres:
        return
    signs = np.stack([_mirror_signs(mirror) for mirror in MIRRORS])
    mirrored = np.stack([prints[0] * signs for _, prints in centres])  # [volume, mirror, value]
    for rank, ranks in _to_compare(np.array([found[n].shape for n in numbers]), compared[numbers]):
        starts, prints = _fingerprints(found[numbers[rank]], _LOST / 2)
        for first in range(0, len(ranks), _AT_ONCE):
            others = ranks[first : first + _AT_ONCE]
            agree = prints @ mirrored[others].reshape(-1, prints.shape[1]).T  # [place, volume and mirror]
            best = agree.max(axis=0).reshape(-1, len(MIRRORS))
            for n in np.flatnonzero(best.max(axis=1) > _FINGERPRINTS_ABOVE):
                mirror = int(best[n].argmax())
                place = agree[:, n * len(MIRRORS) + mirror].argmax()
                smaller = numbers[others[n]]
                centre = _mirrored_start(centres[others[n]][0][0], found[smaller].shape, MIRRORS[mirror])
                shift = tuple(int(s) for s in np.subtract(starts[place], centre))
                yield _Guess(numbers[rank], smaller, MIRRORS[mirror], shift)  # type: ignore[arg-type]


def _to_compare(lengths: NDArray[np.int64], compared: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield each thumbnail that has smaller ones to be compared with, and those, by their places in order of size.

    ``lengths`` are of all thumbnails along each axis, ``[n, 3]``.
    """
    elsewhere = {number: np.flatnonzero((compared != number) | (compared == NEW)) for number in set(compared.tolist())}
    for rank, number in enumerate(compared.tolist()):
        others = elsewhere[number]
        others = others[: np.searchsorted(others, rank)]
        others = others[(lengths[others] + 1 >= _LEAST_LENGTH * lengths[rank]).all(axis=1)]
        if len(others):
            yield rank, others


def _fingerprints(thumbnail: Thumbnail, reach: float) -> tuple[NDArray[np.int64], Field]:
    """Return the fingerprints of blocks around the centre: their first cells ``[n, 3]``, and unit vectors ``[n, v]``.

    Blocks lie up to ``reach`` of the body's length away from the centre, the only one where that is 0.
    """
    lacks = [max(0, block - n) for block, n in zip(_BLOCK, thumbnail.shape, strict=True)]
    padded = np.pad(thumbnail, [(lack // 2, lack - lack // 2) for lack in lacks], mode="edge")
    ranges = [_around_middle(n - block, reach * n) for block, n in zip(_BLOCK, padded.shape, strict=True)]
    near = padded[tuple(slice(at[0], at[-1] + block) for at, block in zip(ranges, _BLOCK, strict=True))]
    waves = np.clip(near, *_SOFT_TISSUE).astype(np.float32)
    for axis, block in enumerate(_BLOCK):  # one axis at a time: blocks beside each other share most of the work
        waves = np.tensordot(sliding_window_view(waves, block, axis), _cosines(block), 1)
    waves = waves.reshape(-1, _WAVES**3)[:, 1:]
    starts = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, 3) - [lack // 2 for lack in lacks]
    return starts, waves / np.maximum(np.linalg.norm(waves, axis=1, keepdims=True), 1e-6)


def _around_middle(last: int, away: float) -> NDArray[np.int64]:
    """Return the first cells from 0 to ``last`` that lie up to ``away`` from the middle one."""
    middle, reach = last // 2, int(np.ceil(away))
    return np.arange(max(0, middle - reach), min(last, middle + reach) + 1)


def _cosines(length: int) -> Field:
    """Return the slowest cosines over a block, ``[cell, wave]``: a discrete cosine transform, the mean first."""
    at = (np.arange(length)[:, None] + 0.5) / length
    return np.asarray(np.cos(np.pi * at * np.arange(_WAVES)), dtype=np.float32)


def _mirror_signs(mirror: Cells) -> Field:
    """Return the factors that turn a fingerprint into that of the mirrored block: odd waves change their sign."""
    along = [np.array(step, np.float32) ** np.arange(_WAVES) for step in mirror]
    return np.asarray(np.einsum("a,b,c->abc", *along).reshape(-1)[1:])


def _correlation_near(larger: Thumbnail, smaller: Thumbnail, guess: _Guess) -> float:
    """Return the highest correlation near the guessed shift: of all tissue, or of tissue without its border.

    A smaller field of view changes the border. Fingerprints are blurred, so they agree beside the true shift, too.
    """
    if smaller.size < _FEW:
        return _correlation_of_small(larger, smaller, guess)
    pair = _in_common_range(larger, smaller[tuple(slice(None, None, step) for step in guess.mirror)])
    inner = (_without_border(pair[0]), _without_border(pair[1]))
    return max(_best_near(*pair, guess.shift), _best_near(*inner, guess.shift))


def _correlation_of_small(larger: Thumbnail, smaller: Thumbnail, guess: _Guess) -> float:
    """Return the highest correlation of all cells at the guessed shift and a cell beside it; -1 for a mirrored one.

    So few cells look alike by chance at some shift, if all are tried.
    """
    if guess.mirror != MIRRORS[0]:
        return -1.0
    one, other = larger.astype(np.float32) + 1, smaller.astype(np.float32) + 1  # 0 stands for no tissue
    z, y, x = guess.shift
    near = product((z - 1, z, z + 1), (y - 1, y, y + 1), (x - 1, x, x + 1))
    return max(_correlation(one, other, shift) for shift in near)


def _best_near(one: Field, other: Field, shift: Cells) -> float:
    """Return the highest correlation found by going from a shift to better ones, at last by halves and quarters."""
    at, found = shift, {shift: _correlation(one, other, shift)}
    while found[at] > _HOPELESS:
        near: list[Cells] = [(at[0] + z, at[1] + y, at[2] + x) for z, y, x in product((-1, 0, 1), repeat=3)]
        found |= {shift: _correlation(one, other, shift) for shift in near if shift not in found}
        best = max(near, key=lambda shift: found[shift])
        if found[best] <= found[at]:
            return _best_within_a_cell(one, other, at) if found[at] > _FINER_ABOVE else found[at]
        at = best
    return found[at]


def _best_within_a_cell(one: Field, other: Field, shift: Cells) -> float:
    """Return the highest correlation at steps of half a cell around a shift, then of a quarter around the best."""
    moved: dict[tuple[float, ...], tuple[Field, Field]] = {(): (one, other)}

    def apart(part: tuple[float, ...]) -> tuple[Field, Field]:
        """Move both along the first axes, each step once."""
        if part not in moved:
            moved[part] = _apart(*apart(part[:-1]), len(part) - 1, part[-1])
        return moved[part]

    def agreement(part: tuple[float, ...]) -> float:
        return _correlation(*_apart(*apart(part[:-1]), len(part) - 1, part[-1]), shift)

    halves = {part: agreement(part) for part in product((-0.5, 0.0, 0.5), repeat=3)}
    best = max(halves, key=lambda part: halves[part])
    choices = [sorted({min(max(at + step, -0.5), 0.5) for step in (-0.25, 0.0, 0.25)}) for at in best]
    return max(halves[part] if part in halves else agreement(part) for part in product(*choices))


def _in_common_range(a: Thumbnail, b: Thumbnail) -> tuple[Field, Field]:
    """Return both clipped to the values that both can hold: a copy is often clipped to a window."""
    low, high = max(int(a.min()), int(b.min())), min(int(a.max()), int(b.max()))
    return _tissue(np.clip(a, low, high) - low), _tissue(np.clip(b, low, high) - low)


def _tissue(values: Thumbnail) -> Field:
    """Return the values of cells that show tissue, 0 elsewhere."""
    return np.where(values > _TISSUE_STEPS, values, 0).astype(np.float32)


def _without_border(values: Field) -> Field:
    """Return the values of tissue whose neighbours in the plane are tissue, 0 elsewhere.

    A cell at the border of a body, or of what a scanner or a cut left of it, is a mixture that no copy shares.
    """
    inner = tissue = values > 0
    for axis in (1, 2):
        edge = np.zeros_like(np.take(tissue, [0], axis))
        beyond = np.concatenate([edge, tissue, edge], axis)
        inner = inner & np.take(beyond, range(2, beyond.shape[axis]), axis)
        inner = inner & np.take(beyond, range(beyond.shape[axis] - 2), axis)
    return np.where(inner, values, 0)


def _apart(a: Field, b: Field, axis: int, step: float) -> tuple[Field, Field]:
    """Return both moved against each other by a part of a cell: half of it each, so that both blur alike."""
    return (_moved(a, axis, step / 2), _moved(b, axis, -step / 2)) if step else (a, b)


def _moved(values: Field, axis: int, part: float) -> Field:
    """Return the values a part of a cell further along an axis, interpolated where both cells show tissue, else 0."""
    last = values.shape[axis] - 1
    step = 1 if part > 0 else -1
    neighbour = np.take(values, np.clip(np.arange(last + 1) + step, 0, last), axis)
    return np.where((values > 0) & (neighbour > 0), (1 - abs(part)) * values + abs(part) * neighbour, 0)


def _correlation(a: Field, b: Field, shift: Cells) -> float:
    """Return the correlation over cells that show tissue in both, ``b`` beginning at cell ``shift`` of ``a``.

    -1 where too little of the smaller one's tissue lies in the larger one.
    """
    ends = [min(s + m, n) for s, n, m in zip(shift, a.shape, b.shape, strict=True)]
    if any(end <= max(s, 0) for s, end in zip(shift, ends, strict=True)):
        return -1.0
    x = a[tuple(slice(max(s, 0), end) for s, end in zip(shift, ends, strict=True))]
    y = b[tuple(slice(max(-s, 0), end - s) for s, end in zip(shift, ends, strict=True))]
    x, y = x.flatten(), y.flatten()
    in_both = (x > 0) & (y > 0)
    cells = np.count_nonzero(in_both)
    if not cells or cells < _COMMON * np.count_nonzero(b > 0):
        return -1.0
    tissue = in_both.astype(np.float32)  # to pick the cells instead takes twice as long
    for values in (x, y):
        values *= tissue
        values -= values.sum() / np.float32(cells)
        values *= tissue
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > _NO_SPREAD else -1.0


def _mirrored_start(start: NDArray[np.int64], shape: Sequence[int], mirror: Cells) -> NDArray[np.int64]:
    """Return where a block begins once its thumbnail is mirrored."""
    ends = np.subtract(shape, start) - _BLOCK
    return np.where(np.array(mirror) < 0, ends, start)
