"""Between volumes and patches, for any shape: against plain loops, the kernels and the maps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maesil import kernels
from maesil.config.schema import MaskConfig
from maesil.data.crops import patch_shares
from maesil.models.masking import complementary_masks, make_masks
from maesil.models.patches import expand_cells, halvings, patchify, unpatchify
from maesil.types import edges_told, one_if_cube, zyx

MANY = settings(max_examples=40, deadline=None, derandomize=True)
GRIDS, PATCHES = st.tuples(*[st.integers(1, 4)] * 3), st.tuples(*[st.integers(1, 6)] * 3)


@MANY
@given(grid=GRIDS, patch=PATCHES, batch=st.integers(1, 3))
def test_patches_are_those_of_a_loop_and_of_the_kernels_and_go_back(grid, patch, batch):
    shape = tuple(n * edge for n, edge in zip(grid, patch, strict=True))
    generator = torch.Generator().manual_seed(math.prod(shape))
    volume = torch.randint(-1000, 1000, (batch, *shape), generator=generator).short()
    cut = patchify(volume, patch)
    corners = itertools.product(*(range(0, n, edge) for n, edge in zip(shape, patch, strict=True)))
    for token, (z, y, x) in enumerate(corners):
        box = volume[:, z : z + patch[0], y : y + patch[1], x : x + patch[2]]
        assert torch.equal(cut[:, token], box.reshape(batch, -1))
    ids = torch.arange(math.prod(grid)).expand(batch, -1)
    options = {"patch_size": patch, "window": (0.0, 1.0), "mean": 0.0, "std": 1.0}
    clipped = kernels.gather_patches(volume, ids, dtype=torch.float32, **options)
    assert torch.equal(clipped, cut.float().clamp(0, 1))
    assert torch.equal(unpatchify(cut, grid, patch), volume)
    numbers = torch.arange(math.prod(grid)).reshape(1, *grid)
    assert torch.equal(patchify(expand_cells(numbers, patch), patch), ids[:1, :, None].expand(-1, -1, math.prod(patch)))


@MANY
@given(
    cells=st.tuples(*[st.integers(1, 3)] * 3),
    patch=st.tuples(*[st.sampled_from([1, 2, 4, 8, 16])] * 3),
    flip=st.tuples(*[st.booleans()] * 3),
)
def test_the_share_of_a_patch_is_the_mean_of_its_voxels_mirrored_with_the_crop(cells, patch, flip):
    cells = tuple(n * max(1, edge // 8) for n, edge in zip(cells, patch, strict=True))
    generator = torch.Generator().manual_seed(sum(patch))
    maps = torch.randint(0, 256, (1, *cells), generator=generator).to(torch.uint8)
    voxels = expand_cells(maps.double() / 255, 8).flip([axis for axis, on in enumerate(flip, start=1) if on])
    found = patch_shares(maps, patch, torch.tensor([flip]))
    torch.testing.assert_close(found.double(), patchify(voxels, patch).mean(dim=-1), atol=1e-6, rtol=0)


@MANY
@given(
    grid=st.tuples(st.integers(2, 6), st.integers(2, 6), st.integers(2, 6)),
    kind=st.sampled_from(["dual", "random", "tube", "slab"]),
    seed=st.integers(0, 999),
)
def test_masks_hide_equally_many_tokens_of_any_grid_and_in_turn_all(grid, kind, seed):
    config, tokens = MaskConfig(kind=kind), math.prod(grid)
    masks = make_masks(config, grid, [seed, seed + 1])
    assert masks.ids_keep.shape[1] + masks.ids_masked.shape[1] == tokens
    order = torch.cat([masks.ids_keep, masks.ids_masked], dim=1)
    assert torch.equal(order.sort(dim=1).values, torch.arange(tokens).expand(2, -1))
    assert torch.equal(masks.mask.gather(1, masks.ids_masked), torch.ones(masks.ids_masked.shape))
    assert masks.mask.sum(dim=1).tolist() == [masks.ids_masked.shape[1]] * 2
    assert torch.equal(order.gather(1, masks.ids_restore), torch.arange(tokens).expand(2, -1))
    if kind == "tube":
        columns = masks.mask.view(2, grid[0], -1)
        assert torch.equal(columns, columns[:, :1].expand_as(columns))
    hidden = sum(one.mask for one in complementary_masks(config, grid, [seed, seed + 1], torch.device("cpu")))
    assert (hidden > 0).all()


@given(patch=st.tuples(*[st.sampled_from([1, 2, 4, 8, 16])] * 3))
def test_halvings_come_to_the_patch_and_make_thick_voxels_cubes_first(patch):
    steps = halvings(patch)
    assert tuple(np.prod(np.array(steps).reshape(-1, 3), axis=0)) == patch
    assert len(steps) == max(patch).bit_length() - 1
    for before, after in itertools.pairwise(steps):
        assert all(b <= a for b, a in zip(before, after, strict=True))
    assert halvings(8) == [(2, 2, 2)] * 3


def test_edges_are_written_as_one_number_where_they_are_equal():
    assert (zyx(8), zyx((1, 2, 3))) == ((8, 8, 8), (1, 2, 3))
    assert (one_if_cube((8, 8, 8)), one_if_cube(8), one_if_cube((8, 8, 4))) == (8, 8, (8, 8, 4))
    assert (edges_told((8, 8, 8)), edges_told((4, 8, 8))) == ("8", "4x8x8")
