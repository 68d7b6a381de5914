"""A decoded source, before it is turned, resampled and cut: the meeting point of the DICOM and the NIfTI reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maesil.geometry import Affine
from maesil.types import Zyx

SCANNED_BYTES = 5
"""Memory a voxel takes in a `Scanned`: its HU and whether it is valid."""

Allocate = Callable[[Zyx], tuple[NDArray[np.float32], NDArray[np.bool_]]]
"""Gives the arrays a reader fills: HU, and which voxels are valid (all False at first)."""


def plain_arrays(shape: Zyx) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return arrays in this process's own memory."""
    return np.empty(shape, dtype=np.float32), np.zeros(shape, dtype=bool)


@dataclass(frozen=True)
class Scanned:
    """HU as the source states them, on the source's own grid."""

    hu: NDArray[np.float32]
    """HU ``[z, y, x]``; meaningless where neither valid nor filled."""
    valid: NDArray[np.bool_]
    """Measured: neither padding nor missing nor interpolated."""
    affine: Affine
    """Voxel index to mm LPS; may be oblique or sheared."""
    notes: tuple[str, ...]
    source: dict[str, Any]
    """Technical description, allow-listed."""
    filled: NDArray[np.bool_] | None = None
    """Not measured but interpolated from measured neighbours; None where nothing is."""

    @property
    def known(self) -> NDArray[np.bool_]:
        """Where HU mean something: measured or interpolated."""
        return self.valid if self.filled is None else self.valid | self.filled

    @property
    def shape(self) -> Zyx:
        """Voxels along z, y, x."""
        z, y, x = self.hu.shape
        return z, y, x
