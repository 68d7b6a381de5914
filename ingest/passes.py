"""Several passes over the same positions in one series: copies are dropped, phases told apart, the rest refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.ingest.header import InstanceHeader
from maesil.ingest.isolated import hu_digests
from maesil.ingest.scanned import SCANNED_BYTES

MIN_SLICES = 16

DRIFT_MM = 0.1
"""So far may a slice stray in its plane from a straight line."""
SAME_POSITION_MM = 0.01
_GAP_TOLERANCE = 0.01
_GAP_TOLERANCE_MM = 0.002

Pass = tuple[str, list[InstanceHeader]]
"""What names a pass, and its slices."""


def normal_of(header: InstanceHeader) -> NDArray[np.float64]:
    """Return the unit normal of a slice's plane."""
    assert header.orientation is not None
    return unit(np.cross(header.orientation[:3], header.orientation[3:]))


def unit(vector: NDArray[np.float64] | Sequence[float]) -> NDArray[np.float64]:
    """Return a direction of length 1: files round their cosines, and 0.5 % would shift the far side by a millimetre."""
    return np.asarray(vector, dtype=np.float64) / np.linalg.norm(vector)


def along(part: Sequence[InstanceHeader]) -> NDArray[np.float64]:
    """Return each slice's place (mm) along the normal of the first slice's plane."""
    return np.asarray([header.position for header in part], dtype=np.float64) @ normal_of(part[0])


def uneven(gaps: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which gaps (mm) differ from their mean by more than 1 %."""
    mean = float(gaps.mean())
    return np.asarray(np.abs(gaps - mean) > np.maximum(_GAP_TOLERANCE * mean, _GAP_TOLERANCE_MM))


@dataclass(frozen=True)
class Positions:
    """Slices by their positions."""

    slices: list[InstanceHeader]
    """In the order of their positions, without copies."""
    copies: list[InstanceHeader]
    """Have the very pixels of a slice at the same position."""
    conflicts: bool
    """Several slices are left at one position."""
    content: dict[int, tuple[int, bytes]]
    """By ``id`` of a slice: number of its position, and a digest of its pixels where it shares that position."""


def by_position(part: Sequence[InstanceHeader]) -> Positions:
    """Sort slices by position and find those that are copies of one another."""
    places = along(part)
    order = np.argsort(places, kind="stable")
    ordered = [part[i] for i in order]
    together = np.split(np.arange(len(ordered)), np.nonzero(np.diff(places[order]) > SAME_POSITION_MM)[0] + 1)
    digests = _digests([ordered[i] for same in together if len(same) > 1 for i in same])
    content = {id(ordered[i]): (n, digests.get(id(ordered[i]), b"")) for n, same in enumerate(together) for i in same}
    first: dict[tuple[int, bytes], InstanceHeader] = {}
    copies = [header for header in ordered if first.setdefault(content[id(header)], header) is not header]
    return Positions(list(first.values()), copies, len(first) > len(together), content)


def _digests(slices: Iterable[InstanceHeader]) -> dict[int, bytes]:
    """Return digests of pixels by ``id`` of their slice; a file is read once, however many of its frames are asked."""
    by_file: dict[Path, list[InstanceHeader]] = defaultdict(list)
    for header in slices:
        by_file[header.path].append(header)
    found: dict[int, bytes] = {}
    for path, frames in by_file.items():
        decoded_bytes = len(frames) * frames[0].rows * frames[0].columns * SCANNED_BYTES
        digests = hu_digests(path, [header.frame for header in frames], decoded_bytes)
        found |= {id(header): digest for header, digest in zip(frames, digests, strict=True)}
    return found


def told_apart(slices: Sequence[InstanceHeader], positions: Positions) -> list[Pass]:
    """Split slices that share positions by the first thing in their headers that leaves no two at one position.

    Copies may share theirs. `Refused` with ``position_conflict`` if nothing does.
    """
    for passes in by_header(slices):
        # A value of its own for nearly every slice tells slices apart, not passes.
        in_whole_passes = sum(len(same) for _, same in passes if len(same) >= MIN_SLICES)
        if in_whole_passes * 2 > len(slices) and all(_without_conflict(same, positions) for _, same in passes):
            return passes
    raise Refused(
        "position_conflict",
        "several slices at one position with different pixels, and nothing in the headers tells them apart",
        slices=len(slices),
    )


def by_header(slices: Sequence[InstanceHeader]) -> Iterator[list[Pass]]:
    """Yield the ways in which headers split slices: by acquisition, phase and the like, at last by what is weaker."""
    columns = [[header.acquisition[n] for header in slices] for n in range(len(slices[0].acquisition))]
    columns.append(["/".join(filter(None, header.acquisition)) for header in slices])
    columns += [[header.weak[n] for header in slices] for n in range(len(slices[0].weak))]
    for values in columns:
        yield _by_value(slices, values)


def interleaved(slices: Sequence[InstanceHeader]) -> list[Pass]:
    """Return the passes of slices that lie between one another, if each is regular by itself; else nothing.

    Two phases shifted by half a step look like one finer scan. Acquisitions one behind the other are one scan.
    """
    passes = _by_value(slices, ["/".join(filter(None, header.acquisition)) for header in slices])
    if len(passes) < 2:
        return []
    names = {id(header): name for name, same in passes for header in same}
    ordered = [names[id(slices[i])] for i in np.argsort(along(slices), kind="stable")]
    runs = 1 + sum(a != b for a, b in pairwise(ordered))
    return passes if runs > len(passes) and all(_regular(same) for _, same in passes) else []


def _by_value(slices: Sequence[InstanceHeader], values: Iterable[str]) -> list[Pass]:
    passes: dict[str, list[InstanceHeader]] = defaultdict(list)
    for header, value in zip(slices, values, strict=True):
        passes[value].append(header)
    return sorted(passes.items())


def _without_conflict(slices: Sequence[InstanceHeader], positions: Positions) -> bool:
    contents = {positions.content[id(header)] for header in slices}
    return len(contents) == len({place for place, _ in contents})


def _regular(slices: Sequence[InstanceHeader]) -> bool:
    return len(slices) > 2 and not uneven(np.diff(np.sort(along(slices)))).any()
