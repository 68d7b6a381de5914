"""Several passes over the same positions in one series: copies are dropped, phases told apart, the rest refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.ingest.header import InstanceHeader
from maesil.ingest.isolated import hu_digests
from maesil.ingest.scanned import SCANNED_BYTES
from maesil.ingest.source_path import SourcePath

MIN_SLICES = 16

DRIFT_MM = 0.1
"""So far may a slice stray in its plane from a straight line."""
SAME_POSITION_MM = 0.01
_GAP_TOLERANCE = 0.01
_GAP_TOLERANCE_MM = 0.002

Pass = tuple[str, list[InstanceHeader]]
"""What names a pass, and its slices."""
Digests = Callable[[Sequence[InstanceHeader]], dict[int, bytes]]
"""Gives digests of the pixels of slices, by ``id`` of the slice: equal where the pixels are."""


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


class Positions:
    """Slices by their positions. Pixels are decoded only where several share one and nothing else decides."""

    def __init__(self, part: Sequence[InstanceHeader], digests: Digests) -> None:
        places = along(part)
        order = np.argsort(places, kind="stable")
        cuts = np.nonzero(np.diff(places[order]) > SAME_POSITION_MM)[0] + 1
        self._groups = [[part[i] for i in same] for same in np.split(order, cuts)]
        self._place = {id(header): n for n, same in enumerate(self._groups) for header in same}
        self._digests = digests
        self._known: dict[int, bytes] = {}
        """By ``id`` of a slice."""
        shared = [same for same in self._groups if len(same) > 1]
        # Phases differ in the middle of the body; at its ends they may share a slice of air.
        in_the_middle = shared[len(shared) // 2] if shared else []
        self.conflicts = self.differ(in_the_middle) or self.differ([header for same in shared for header in same])
        """Several slices of one position differ in their pixels."""

    @property
    def slices(self) -> list[InstanceHeader]:
        """The first slice of each position, in order."""
        return [same[0] for same in self._groups]

    @property
    def copies(self) -> list[InstanceHeader]:
        """All other slices: where nothing conflicts, they have the very pixels of the first."""
        return [header for same in self._groups for header in same[1:]]

    def differ(self, slices: Sequence[InstanceHeader]) -> bool:
        """Return whether two of these slices lie at one position and have different pixels."""
        at_place: dict[int, list[InstanceHeader]] = defaultdict(list)
        for header in slices:
            at_place[self._place[id(header)]].append(header)
        shared = [same for same in at_place.values() if len(same) > 1]
        if self._known_to_differ(shared):
            return True
        unknown = [header for same in shared for header in same if id(header) not in self._known]
        if unknown:
            self._known |= self._digests(unknown)
        return self._known_to_differ(shared)

    def _known_to_differ(self, shared: Iterable[list[InstanceHeader]]) -> bool:
        return any(len({self._known[id(h)] for h in same if id(h) in self._known}) > 1 for same in shared)


def decoded_here(slices: Sequence[InstanceHeader]) -> dict[int, bytes]:
    """Return digests of the pixels of slices, decoded one file after another; by ``id`` of the slice."""
    found: dict[int, bytes] = {}
    for path, frames in by_file(slices).items():
        digests = hu_digests(path, [header.frame for header in frames], decoded_bytes(frames))
        found |= {id(header): digest for header, digest in zip(frames, digests, strict=True)}
    return found


def by_file(slices: Iterable[InstanceHeader]) -> dict[SourcePath, list[InstanceHeader]]:
    """Return slices by their file: it is read once, however many of its frames are asked for."""
    found: dict[SourcePath, list[InstanceHeader]] = defaultdict(list)
    for header in slices:
        found[header.path].append(header)
    return found


def decoded_bytes(frames: Sequence[InstanceHeader]) -> int:
    """Return what the pixels of frames of one file take once they are decoded."""
    return len(frames) * frames[0].rows * frames[0].columns * SCANNED_BYTES


def told_apart(slices: Sequence[InstanceHeader], positions: Positions) -> list[Pass]:
    """Split slices that share positions by the first thing in their headers that leaves no two at one position.

    Copies may share theirs. `Refused` with ``position_conflict`` if nothing does.
    """
    for passes in by_header(slices):
        # A value of its own for nearly every slice tells slices apart, not passes.
        in_whole_passes = sum(len(same) for _, same in passes if len(same) >= MIN_SLICES)
        if in_whole_passes * 2 > len(slices) and not any(positions.differ(same) for _, same in passes):
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


def _regular(slices: Sequence[InstanceHeader]) -> bool:
    return len(slices) > 2 and not uneven(np.diff(np.sort(along(slices)))).any()
