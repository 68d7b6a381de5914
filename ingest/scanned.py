"""A decoded source, before it is turned, resampled and cut: the meeting point of the DICOM and the NIfTI reader."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maesil.geometry import Affine
from maesil.ingest.planes import OnDisk, TemporaryFile, each
from maesil.store.records import Technical
from maesil.types import Planes, Zyx

SCANNED_BYTES = 5
"""Memory a voxel takes in a `Scanned`: its HU and whether it is valid."""

Allocate = Callable[[Zyx], tuple[Planes, Planes]]
"""Gives the volumes a reader fills slice by slice: HU (float32), and which voxels are valid (bool, False at first)."""


def plain_arrays(shape: Zyx) -> tuple[Planes, Planes]:
    """Return arrays in this process's own memory."""
    return np.empty(shape, dtype=np.float32), np.zeros(shape, dtype=bool)


def scanned_on_disk(file: TemporaryFile, folder: Path | None, shape: Sequence[int]) -> tuple[Planes, Planes]:
    """Return the same in a temporary file of that folder, which is made as long as they need."""
    z, y, x = (int(n) for n in shape)
    os.ftruncate(file.fileno(), SCANNED_BYTES * z * y * x)
    hu = OnDisk(file, folder or Path(), (z, y, x), np.float32)
    return hu, OnDisk(file, folder or Path(), (z, y, x), bool, offset=hu.dtype.itemsize * z * y * x)


@dataclass(frozen=True)
class Scanned:
    """HU as the source states them, on the source's own grid."""

    hu: Planes
    """HU ``[z, y, x]``, float32; meaningless where neither valid nor filled."""
    valid: Planes
    """Measured: neither padding nor missing nor interpolated (bool)."""
    affine: Affine
    """Voxel index to mm LPS; may be oblique or sheared."""
    notes: tuple[str, ...]
    source: Technical
    filled: Planes | None = None
    """Not measured but interpolated from measured neighbours; None where nothing is."""

    @property
    def known(self) -> Planes:
        """Where HU mean something: measured or interpolated."""
        return self.valid if self.filled is None else each(np.logical_or, self.valid, self.filled)

    @property
    def shape(self) -> Zyx:
        """Voxels along z, y, x."""
        z, y, x = self.hu.shape
        return z, y, x
