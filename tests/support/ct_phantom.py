"""The oracle of the hard inputs: HU as a smooth function of world position, scored where a store puts voxels.

The phantom looks like CT to a plausibility check (air around a body with fat, muscle, lung, bone) and is not
symmetric in any axis, so that no flip, swap or shift of axes can go unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.types import MAP_CELL

SHAPE = (24, 40, 48)
SPACING = (2.6, 1.7, 1.3)  # z, y, x (mm)
ORIGIN = (-31.7, -33.1, -804.5)  # LPS (mm)


def analytic_hu(points: np.ndarray) -> np.ndarray:
    """HU (float64, unrounded) at LPS points [..., 3]; air beyond about 28 mm from the axis x = y = 0.

    Along z the HU rise by 5 a mm: a shift is seen, and linear interpolation adds no error of its own there.
    """
    x, y, z = np.moveaxis(np.asarray(points, np.float64), -1, 0)
    z = z + 774.0
    hu = np.full(x.shape, -1000.0)
    hu = _blend(hu, 24.0 - np.hypot((x - 0.03 * z) * 0.95, y * 1.04), 40.0 + 0.8 * x - 0.5 * y + 5.0 * z)
    hu = _blend(hu, 9.0 - np.hypot(x - 11.0, y + 5.0) - 0.09 * z, -800.0 + 5.0 * z)
    hu = _blend(hu, 6.5 - np.hypot(x + 9.0, y - 9.0) + 0.05 * z, 1000.0 + 5.0 * z)
    return _blend(hu, 8.0 - np.sqrt((x + 7.0) ** 2 + (y + 9.0) ** 2 + (0.7 * (z - 9.0)) ** 2), -130.0)


def _blend(below: np.ndarray, depth: np.ndarray, value: np.ndarray | float) -> np.ndarray:
    share = 0.5 * (1.0 + np.tanh(depth / 2.5))
    return below + share * (value - below)


def base_affine(spacing=SPACING, origin=ORIGIN) -> np.ndarray:
    """Affine of the axis-aligned grid: [z, y, x, 1] to LPS mm."""
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing
    affine[:3, 3] = origin
    return affine


def rotated(affine: np.ndarray, degrees: tuple[float, float, float]) -> np.ndarray:
    """The same grid turned about x, y, z in turn, around the phantom's centre."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        cosine, sine = np.cos(angle), np.sin(angle)
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        step = np.eye(3)
        step[i, i] = step[j, j] = cosine
        step[i, j], step[j, i] = -sine, sine
        turn = step @ turn
    centre = np.array([0.0, 0.0, -774.0])
    result = np.eye(4)
    result[:3, :3] = turn @ affine[:3, :3]
    result[:3, 3] = centre + turn @ (affine[:3, 3] - centre)
    return result


def grid_points(affine: np.ndarray, shape=SHAPE) -> np.ndarray:
    """LPS positions [z, y, x, 3] of all voxel centres."""
    index = np.moveaxis(np.indices(shape, dtype=np.float64), 0, -1)
    return index @ np.asarray(affine)[:3, :3].T + np.asarray(affine)[:3, 3]


def sample(affine: np.ndarray, shape=SHAPE) -> np.ndarray:
    """HU (float64) of the phantom on a grid [z, y, x]."""
    return _sampled(np.asarray(affine, np.float64).tobytes(), tuple(shape)).copy()


@lru_cache(maxsize=64)
def _sampled(affine: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Hundreds of cases have the phantom on the same few grids."""
    return analytic_hu(grid_points(np.frombuffer(affine).reshape(4, 4), shape))


@dataclass(frozen=True)
class Score:
    """Absolute HU error over the voxels that the store calls valid, and how many those are."""

    max_error: float
    mean_error: float
    voxels: int
    valid: int


def score_world(store: Store, volume_id: str, hu_function=analytic_hu, reader: SuperpatchReader | None = None) -> Score:
    """Compare the stored HU with ``hu_function`` at the positions the volume's affine gives its voxels."""
    reader = reader or SuperpatchReader(store)
    volume = reader.volumes[volume_id]
    stored = reader.read_region(volume_id, (0, 0, 0), volume.shape).astype(np.float64)
    expected = np.clip(hu_function(grid_points(volume.affine, volume.shape)), -1024.0, 3071.0)
    valid = valid_voxels(reader, volume)
    error = np.abs(stored - expected)[valid]
    if error.size == 0:
        return Score(np.inf, np.inf, stored.size, 0)
    return Score(float(error.max()), float(error.mean()), stored.size, int(valid.sum()))


def valid_voxels(reader: SuperpatchReader, volume) -> np.ndarray:
    """True for voxels in cells of the ``valid`` map that lie wholly inside the scan."""
    share = reader.read_map(volume.volume_id, "valid").astype(np.float64)
    inside = np.ones(volume.shape)
    pads = [(0, -n % MAP_CELL) for n in volume.shape]
    z, y, x = share.shape
    counts = np.pad(inside, pads).reshape(z, MAP_CELL, y, MAP_CELL, x, MAP_CELL).sum(axis=(1, 3, 5))
    whole = share >= np.rint(255.0 * counts / MAP_CELL**3) - 0.5
    grown = whole.repeat(MAP_CELL, 0).repeat(MAP_CELL, 1).repeat(MAP_CELL, 2)
    return grown[tuple(slice(n) for n in volume.shape)]
