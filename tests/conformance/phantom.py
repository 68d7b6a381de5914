"""The body that the outside cases scan: HU as a function of world position, and the scans made of it.

The outside cases were written before their author had read `ingest`, and share nothing with the suite's own phantom:
other organs, other sizes, another writer. No symmetry maps this body to itself, so a flip, a swapped axis or a shift by
a voxel shows.
Positions are DICOM LPS in mm; arrays are z y x.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

AIR = -1000.0
SOFT_EDGE_MM = 9.0

# centre (mm LPS), half axes (mm), HU inside: later ones lie upon earlier ones
_ORGANS = (
    ((0, 0, 0), (95, 72, 400), 45.0),  # trunk, longer than the scan
    ((48, -12, 35), (30, 38, 66), -830.0),  # left lung
    ((-44, -8, 50), (36, 44, 60), -800.0),  # right lung
    ((-38, -10, -52), (42, 36, 30), 95.0),  # liver
    ((6, 48, 0), (16, 14, 400), 420.0),  # spine
    ((52, 30, -45), (22, 18, 24), -95.0),  # fat
    ((20, -38, -20), (14, 12, 34), 60.0),  # vessel: enhances
)
_VESSEL = len(_ORGANS) - 1


def hu(world: NDArray[np.float64], enhancement: float = 0.0) -> NDArray[np.float64]:
    """Return HU (float) at LPS positions ``[..., 3]`` mm; ``enhancement`` is added inside the vessel and the liver."""
    value = np.full(world.shape[:-1], AIR)
    for number, (centre, half, inside) in enumerate(_ORGANS):
        half_mm = np.asarray(half, dtype=np.float64)
        radius = np.linalg.norm((world - centre) / half_mm, axis=-1)
        share = 1 / (1 + np.exp(np.clip((radius - 1) * half_mm.min() / SOFT_EDGE_MM * 6, -60, 60)))
        level = inside + 0.11 * world[..., 0] - 0.07 * world[..., 1] + 0.09 * world[..., 2]
        if number in (3, _VESSEL):
            level = level + enhancement
        value = value + share * (level - value)
    return value


@dataclass(frozen=True)
class Scan:
    """A regular grid in the body: where its voxels lie, and what they hold.

    ``step``, ``down``, ``along`` are the vectors (mm LPS) to the next slice, row, column; ``middle`` is the scan's
    centre relative to ``table``, the offset of the whole body.
    """

    shape: tuple[int, int, int] = (26, 40, 48)
    step: tuple[float, float, float] = (0.0, 0.0, 5.5)
    down: tuple[float, float, float] = (0.0, 5.0, 0.0)
    along: tuple[float, float, float] = (4.6, 0.0, 0.0)
    middle: tuple[float, float, float] = (3.0, -2.0, 4.0)
    table: tuple[float, float, float] = (0.0, 0.0, 0.0)
    enhancement: float = 0.0
    tolerance: float = 0.51  # HU; of the worst voxel where the grid is kept
    resampled: bool = False  # the grid is not kept: a sheared stack, or another spacing

    @property
    def affine(self) -> NDArray[np.float64]:
        """4x4: voxel index (z, y, x, 1) to LPS mm."""
        matrix = np.eye(4)
        matrix[:3, 0], matrix[:3, 1], matrix[:3, 2] = self.step, self.down, self.along
        centre_index = (np.asarray(self.shape) - 1) / 2
        matrix[:3, 3] = np.asarray(self.middle) + self.table - matrix[:3, :3] @ centre_index
        return matrix

    def centres(self) -> NDArray[np.float64]:
        """Return the LPS position of every voxel, ``[z, y, x, 3]``."""
        index = np.stack(np.meshgrid(*(np.arange(n) for n in self.shape), indexing="ij"), axis=-1)
        return index @ self.affine[:3, :3].T + self.affine[:3, 3]

    def at(self, world: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the HU this scan should hold at LPS positions."""
        return hu(world - np.asarray(self.table), self.enhancement)

    @functools.cache  # noqa: B019 (scans live as long as the tests do)
    def values(self) -> NDArray[np.int32]:
        """Return the HU of every voxel, rounded to whole numbers."""
        return np.rint(self.at(self.centres())).astype(np.int32)

    def position(self, k: float) -> NDArray[np.float64]:
        """Return ImagePositionPatient of slice ``k`` (mm LPS)."""
        return self.affine[:3, 3] + k * np.asarray(self.step)

    def but(self, **changes: object) -> Scan:
        """Return the same scan with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def turned(self, *degrees_xyz: float) -> Scan:
        """Return the scan turned about its middle (extrinsic x, y, z rotations in degrees)."""
        turn = rotation(*degrees_xyz)
        vectors = (tuple(turn @ np.asarray(v)) for v in (self.step, self.down, self.along))
        step, down, along = vectors
        return self.but(step=step, down=down, along=along)

    def part(self, start: int, stop: int) -> Scan:
        """Return slices ``start`` to ``stop`` as a scan of their own."""
        middle = np.asarray(self.middle) + ((start + stop - self.shape[0]) / 2) * np.asarray(self.step)
        return self.but(shape=(stop - start, *self.shape[1:]), middle=tuple(middle))


def rotation(*degrees_xyz: float) -> NDArray[np.float64]:
    """Return the matrix of extrinsic rotations about x, y, z."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees_xyz)):
        a, b = [i for i in range(3) if i != axis]
        one = np.eye(3)
        one[a, a] = one[b, b] = np.cos(angle)
        one[a, b], one[b, a] = -np.sin(angle), np.sin(angle)
        turn = one @ turn
    return turn
