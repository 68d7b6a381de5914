"""Surface Dice on cubes whose surfaces are known."""

from __future__ import annotations

import pytest
import torch

from maesil.downstream.surface import surface_dice


def cube(shift: int = 0) -> torch.Tensor:
    mask = torch.zeros(40, 40, 40, dtype=torch.bool)
    mask[10 + shift : 30 + shift, 10:30, 10:30] = True
    return mask


def test_within_the_tolerance_all_of_the_surface_counts_and_beyond_it_two_of_six_faces_do_not():
    assert surface_dice(cube(), cube(), (1, 1, 1), 0.5) == 1.0
    assert surface_dice(cube(3), cube(), (2.0, 1.0, 1.0), 6.0) == 1.0
    assert surface_dice(cube(3), cube(), (2.0, 1.0, 1.0), 5.0) < 0.95
    # Spacing 1: of six faces of 20 x 20, the two across the shift are three voxels off; edges make up the rest.
    assert surface_dice(cube(3), cube(), (1, 1, 1), 1.0) == pytest.approx(4 / 6, abs=0.06)


def test_nothing_found_scores_0_and_nothing_there_has_no_score():
    nothing = torch.zeros(40, 40, 40, dtype=torch.bool)
    assert surface_dice(nothing, cube(), (1, 1, 1), 1.0) == 0.0 == surface_dice(cube(), nothing, (1, 1, 1), 1.0)
    assert surface_dice(nothing, nothing, (1, 1, 1), 1.0) is None
