from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from maesil.config.schema import HEADS, MaskConfig, ModelConfig
from maesil.evaluation.metrics import BorderSums
from maesil.models.faces import Faces, Known, neighbours, sharing_out, voxels_of_faces
from maesil.models.heads import Boxes, make_head
from maesil.models.masking import make_masks
from maesil.models.patches import patchify, tokens_at, unpatchify

CONFIG = ModelConfig(crop=32, width=16, depth=1, decoder_width=12, decoder_depth=1)
GRID = CONFIG.grid


def nothing_known(samples=1):
    return Known(torch.zeros(samples, 0, 512), torch.zeros(samples, 0, dtype=torch.int64), torch.zeros(samples, 0) > 0)


def all_tokens(samples=1):
    return torch.arange(64).expand(samples, -1)


def smooth_volume(samples=1):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(samples, 1, 6, 6, 6, generator=generator)
    return functional.interpolate(coarse, size=(32, 32, 32), mode="trilinear")[:, 0]


def test_faces_are_the_outermost_layers_of_a_patch():
    patch = torch.randn(4, 5, 6)
    faces = [patch.flatten()[side] for sides in voxels_of_faces((4, 5, 6), 2) for side in sides]
    expected = [
        patch[:2], patch[2:].flip(0), patch[:, :2].movedim(1, 0), patch[:, 3:].flip(1).movedim(1, 0),
        patch[:, :, :2].movedim(2, 0), patch[:, :, 4:].flip(2).movedim(2, 0),
    ]  # fmt: skip
    for face, want in zip(faces, expected, strict=True):
        assert torch.equal(face, want.reshape(2, -1))


def test_neighbours_are_those_of_the_grid():
    grid = (2, 3, 4)
    beside, inside = neighbours(grid)
    steps = [(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)]
    for token, place in enumerate(torch.cartesian_prod(*(torch.arange(n) for n in grid)).tolist()):
        for side, step in enumerate(steps):
            z, y, x = (p + s for p, s in zip(place, step, strict=True))
            there = 0 <= z < 2 and 0 <= y < 3 and 0 <= x < 4
            assert inside[token, side] == there
            assert beside[token, side] == ((z * 3 + y) * 4 + x if there else token)


@pytest.mark.parametrize("patch", [8, (4, 8, 16)])
def test_boxes_cut_from_one_volume_blend_back_into_it(patch):
    """The weights of overlapping boxes add up to 1, at the faces of the crop too."""
    boxes, volume = Boxes(ModelConfig(crop=32, patch=patch)), smooth_volume(2)
    cut = functional.pad(volume[:, None], [reach for reach in boxes.reach[::-1] for _ in range(2)])[:, 0]
    for axis in range(3):
        cut = cut.unfold(axis + 1, boxes.edges[axis], boxes.patch[axis])
    tokens = torch.arange(cut[0, ..., 0, 0, 0].numel()).expand(2, -1)
    known = Known(torch.zeros(2, 0, 512), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0) > 0)
    blended = boxes.blend(cut.reshape(2, tokens.shape[1], -1), tokens, known)
    torch.testing.assert_close(blended, patchify(volume, patch))


def test_boxes_that_disagree_are_faded_not_cut():
    boxes = Boxes(CONFIG)
    levels = torch.zeros(1, 64, 10**3)
    levels[:, 32:] = 1.0
    along_z = unpatchify(boxes.blend(levels, all_tokens(), nothing_known()), GRID, 8)[0, :, 16, 16]
    assert (along_z.diff() >= 0).all() and along_z.diff().max() < 0.6
    assert along_z[8:15].eq(0).all() and along_z[17:].eq(1).all()


def test_a_mismatch_between_predictions_is_shared_out_evenly():
    """Two constant patches side by side: the step between them becomes a slope."""
    jump = torch.ones(1, 64)
    spread = sharing_out(8).unflatten(0, (6, 64))
    lower = (jump @ spread[1]).reshape(8, 8, 8)  # what lies beyond z+ is 1 higher
    upper = 1 - (jump @ spread[0]).reshape(8, 8, 8)
    along = torch.cat([lower[:, 3, 3], upper[:, 3, 3]])
    assert (along.diff() >= 0).all()
    assert along.diff().max() < 0.13
    assert along[:4].eq(0).all() and along[-4:].eq(1).all()


@pytest.mark.parametrize("name", ["overlap", "interpolate", "refine"])
def test_untrained_heads_leave_less_of_a_grid_than_the_linear_one(name):
    decoded = torch.randn(1, 64, 12, generator=torch.Generator().manual_seed(1))
    reference = smooth_volume()[0] * 100

    def border_ratio(head):
        made = make_head(ModelConfig(crop=32, width=16, decoder_width=12, head=head))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        predicted = unpatchify(made(decoded, all_tokens(), nothing_known()), GRID, 8)[0]
        sums = BorderSums(8, 32, (-1000.0, 1000.0))
        sums.add(reference, predicted.detach() * 100, torch.ones(32, 32, 32) > 0)
        return sums.ratio

    assert border_ratio(name) < border_ratio("linear")


@pytest.mark.parametrize("patch", [8, (4, 8, 16)])
def test_the_mismatch_is_the_neighbour_s_nearest_layer_less_the_patch_s_own(patch):
    config, volume = ModelConfig(crop=32, patch=patch), smooth_volume()
    tokens, faces = torch.arange(config.tokens)[None], Faces(config)
    nothing = Known(torch.zeros(1, 0, config.patch_voxels), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0) > 0)
    found, states = faces.mismatch(patchify(volume, patch), tokens, nothing)
    number = torch.arange(config.tokens).reshape(config.grid)
    for axis, edge in enumerate(config.patch_zyx):
        along = volume[0].movedim(axis, 0)
        for index, one in enumerate(number.movedim(axis, 0)):
            first, last = index * edge, (index + 1) * edge - 1
            for side, (own, beyond) in enumerate(((first, first - 1), (last, last + 1))):
                there = 0 <= beyond < len(along)
                step = along[beyond] - along[own] if there else torch.zeros_like(along[0])
                shape = [n for other, n in enumerate(config.patch_zyx) if other != axis]
                expected = step.reshape(one.shape[0], shape[0], one.shape[1], shape[1]).transpose(1, 2).flatten(2)
                assert torch.equal(found[axis][0, one, side], expected)
                assert (states[0, one, 2 * axis + side, 0] == there).all()


@pytest.mark.parametrize("patch", [8, (4, 8, 16)])
def test_a_visible_token_reaches_into_no_other(patch):
    config = ModelConfig(crop=32, patch=patch)
    boxes, visible = Boxes(config), torch.tensor([[config.tokens // 2]])
    tokens = torch.arange(config.tokens)[None]
    levels = (tokens == visible).float()[..., None].expand(-1, -1, math.prod(boxes.edges))
    blended = boxes.blend(levels, tokens, Known(torch.zeros(1, 1, config.patch_voxels), visible, torch.ones(1, 1) > 0))
    others = tokens[0] != visible[0]
    assert (blended[0, others] == 0).all() and (blended[0, ~others] > 0).all()


@pytest.mark.parametrize("name", HEADS)
def test_what_is_predicted_for_visible_tokens_changes_nothing_for_the_hidden_ones(name):
    """Scores of hidden patches must not depend on whether the visible ones are predicted too, for a picture."""
    head = make_head(ModelConfig(crop=32, width=16, decoder_width=12, head=name))
    masks = make_masks(MaskConfig(), GRID, [0, 1])
    known = Known(torch.randn(2, 16, 512), masks.ids_keep, torch.ones(2, 16) > 0)
    decoded = torch.randn(2, 64, 12)
    hidden = head(decoded if head.needs_all_tokens else tokens_at(decoded, masks.ids_masked), masks.ids_masked, known)
    everything = head(decoded, all_tokens(2), known)
    torch.testing.assert_close(tokens_at(everything, masks.ids_masked), hidden, atol=1e-5, rtol=1e-5)


def test_refinement_sees_the_true_voxels_beside_a_hidden_patch_and_not_those_behind():
    head = make_head(ModelConfig(crop=32, width=16, decoder_width=12, head="refine"))
    masks = make_masks(MaskConfig(), GRID, [0])
    true = torch.randn(1, 16, 512)
    decoded = tokens_at(torch.randn(1, 64, 12), masks.ids_masked)

    def predict(patches):
        return head(decoded, masks.ids_masked, Known(patches, masks.ids_keep, torch.ones(1, 16) > 0))

    base, inner = predict(true), true.clone().reshape(1, 16, 8, 8, 8)
    inner[:, :, 1:-1, 1:-1, 1:-1] += 1.0
    assert torch.equal(predict(inner.reshape(1, 16, 512)), base)
    outer = true.clone().reshape(1, 16, 8, 8, 8)
    outer[:, :, 0] += 1.0
    assert not torch.allclose(predict(outer.reshape(1, 16, 512)), base, atol=1e-4)
