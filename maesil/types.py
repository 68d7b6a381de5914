"""Small value types that more than one part of maesil speaks of.

Axes are ``z y x`` everywhere. Lengths are mm, intensities Hounsfield units (HU).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Zyx = tuple[int, int, int]
Edges = int | Zyx
"""The edges of a box: one number for a cube, or three along z, y, x."""
Spacing = tuple[float, float, float]
Window = tuple[float, float]

HuArray = NDArray[np.int16]
MapArray = NDArray[np.uint8]
FloatArray = NDArray[np.floating[Any]]


class Planes(Protocol):
    """A volume ``[z, y, x]`` of which slices are taken: an array, or something like it that lies on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along z, y, x."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a voxel."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def __setitem__(self, index: Any, values: Any, /) -> None: ...


AIR_HU = -1024
"""What stands outside the scan, and the fill value of every store (HU)."""

MAP_CELL = 8
"""Edge of one cell of the ``valid`` and ``body`` maps (voxels)."""


def zyx(edges: Edges) -> Zyx:
    """Return the three edges of a box along z, y, x."""
    if isinstance(edges, int):
        return edges, edges, edges
    z, y, x = edges
    return z, y, x


def one_if_cube(edges: Edges) -> Edges:
    """Return the edges of a box as they are written down: one number where all three are equal."""
    z, y, x = zyx(edges)
    return z if z == y == x else (z, y, x)


def edges_told(edges: Edges) -> str:
    """Return the edges of a box in words: ``64``, or ``32x48x64``."""
    edges = one_if_cube(edges)
    return str(edges) if isinstance(edges, int) else "x".join(map(str, edges))


@dataclass(frozen=True)
class Intensity:
    """How HU become the numbers a model sees: ``((clip(hu, lo, hi) - lo) / (hi - lo) - mean) / std``.

    ``window`` is ``(lo, hi)`` in HU; ``mean`` and ``std`` are of the windowed values in [0, 1] over the valid
    voxels of the training split.
    """

    window: Window = (-1000.0, 1000.0)
    mean: float = 0.0
    std: float = 1.0
