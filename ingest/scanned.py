"""A decoded source, before it is turned, resampled and cut: the meeting point of the DICOM and the NIfTI reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maesil.geometry import Affine
from maesil.types import Zyx


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
