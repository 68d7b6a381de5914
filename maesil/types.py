"""Small value types that more than one part of maesil speaks of.

Axes are ``z y x`` everywhere. Lengths are mm, intensities Hounsfield units (HU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Zyx = tuple[int, int, int]
Spacing = tuple[float, float, float]
Window = tuple[float, float]

HuArray = NDArray[np.int16]
MapArray = NDArray[np.uint8]
FloatArray = NDArray[np.floating[Any]]

AIR_HU = -1024
"""What stands outside the scan, and the fill value of every store (HU)."""

MAP_CELL = 8
"""Edge of one cell of the ``valid`` and ``body`` maps (voxels)."""


@dataclass(frozen=True)
class Intensity:
    """How HU become the numbers a model sees: ``((clip(hu, lo, hi) - lo) / (hi - lo) - mean) / std``.

    ``window`` is ``(lo, hi)`` in HU; ``mean`` and ``std`` are of the windowed values in [0, 1] over the valid
    voxels of the training split.
    """

    window: Window = (-1000.0, 1000.0)
    mean: float = 0.0
    std: float = 1.0
