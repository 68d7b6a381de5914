"""Crops at fixed places: what is set to air in them, what stays."""

from __future__ import annotations

import numpy as np
import pytest

from maesil.data.crops import blank_outside_scan
from maesil.types import AIR_HU


@pytest.mark.parametrize("cells", [(3, 4, 5), (2, 4, 5), (3, 4, 2), (3, 1, 5)])
def test_cells_without_a_valid_voxel_become_air_and_all_others_stay(cells):
    """A cell that is partly valid stays: its voxels were measured. So does what the map does not cover."""
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 3000, (24, 32, 40)).astype(np.int16)
    valid = rng.choice(np.array([0, 1, 128, 254, 255], np.uint8), cells)
    expected = hu.copy()
    for index in np.argwhere(valid == 0):
        expected[tuple(slice(8 * i, 8 * i + 8) for i in index)] = AIR_HU
    blank_outside_scan(hu, valid)
    assert np.array_equal(hu, expected)
