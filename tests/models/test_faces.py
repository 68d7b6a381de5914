"""What does not meet where patches touch, looked up voxel by voxel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from maesil.config.schema import MaskConfig, ModelConfig
from maesil.models.faces import Faces, Known
from maesil.models.masking import make_masks
from maesil.models.patches import patchify, tokens_at

CONFIG = ModelConfig(crop=16, patch=4, width=16, decoder_width=12)
GRID = CONFIG.grid


@pytest.fixture
def world():
    """Two crops: true voxels, predicted ones, masks; and what a picture shows: true where visible."""
    torch.manual_seed(0)
    true, predicted = torch.randn(2, 16, 16, 16), torch.randn(2, 16, 16, 16)
    masks = make_masks(MaskConfig(), GRID, [1, 2])
    hidden = masks.mask.view(2, *GRID)
    for axis in (1, 2, 3):
        hidden = hidden.repeat_interleave(4, dim=axis)
    known = Known(tokens_at(patchify(true, 4), masks.ids_keep), masks.ids_keep, torch.ones(masks.ids_keep.shape) > 0)
    return torch.where(hidden > 0, predicted, true), tokens_at(patchify(predicted, 4), masks.ids_masked), masks, known


def mismatch(pred_BSV, ids_BS, known):
    """At all six faces, ``[B, S, 6, F]``, and the states of the neighbours."""
    faces, states = Faces(CONFIG).mismatch(pred_BSV, ids_BS, known)
    return torch.cat(faces, dim=2), states


def layer(shown, axis, place, token):
    """The face of P x P voxels of a token's column at a place along an axis."""
    parts = [slice(4 * i, 4 * i + 4) for i in token]
    parts[axis] = place
    return shown[tuple(parts)].flatten()


def test_the_mismatch_is_what_the_neighbour_shows_beside_the_face_less_the_face(world):
    shown, pred_BSV, masks, known = world
    found, states = mismatch(pred_BSV, masks.ids_masked, known)
    for sample in range(2):
        for number, token in enumerate(masks.ids_masked[sample].tolist()):
            place = (token // 16, token // 4 % 4, token % 4)
            for side in range(6):
                axis, step = side // 2, 2 * (side % 2) - 1
                own = 4 * place[axis] + 3 * (side % 2)
                there = 0 <= own + step < 16
                expected = torch.zeros(16)
                if there:
                    beside, face = (layer(shown[sample], axis, at, place) for at in (own + step, own))
                    expected = beside - face
                torch.testing.assert_close(found[sample, number, side], expected)
                beside = (*place[:axis], place[axis] + step, *place[axis + 1 :])
                visible = there and not masks.mask.view(2, *GRID)[(sample, *beside)]
                assert states[sample, number, side].tolist() == [there, visible]


def test_where_predictions_meet_nothing_is_left_to_share_out(world):
    """Half of a step on each side: voxels at the border between two predicted patches come close to each other."""
    _, pred_BSV, masks, known = world
    faces = Faces(CONFIG)
    before, states = mismatch(pred_BSV, masks.ids_masked, known)
    met = faces.meet(pred_BSV, masks.ids_masked, known)
    after, _ = mismatch(met, masks.ids_masked, known)
    between = (states[..., 0] - states[..., 1])[..., None].expand_as(before) > 0
    assert after[between].abs().mean() < 0.6 * before[between].abs().mean()
    # Nothing is moved towards a true patch.
    others = replace(known, patches_BNV=known.patches_BNV + 1)
    assert torch.equal(faces.meet(pred_BSV, masks.ids_masked, others), met)


def test_of_a_patch_that_is_to_be_predicted_the_truth_is_not_used():
    """Mask kind none: all is visible and all is predicted; true voxels must not come in."""
    masks = make_masks(MaskConfig(kind="none"), GRID, [0])
    pred_BSV, true = torch.randn(1, 64, 64), torch.randn(1, 64, 64)
    unusable = torch.zeros(1, 64) > 0
    found = [mismatch(pred_BSV, masks.ids_masked, Known(one, masks.ids_keep, unusable))
             for one in (true, true + 1)]  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not found[0][1][..., 1].any()
