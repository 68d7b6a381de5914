"""Launch grids at sizes that no test could compute: only the first axis of a grid may exceed 65,535."""

from __future__ import annotations

import math

import pytest
import torch

from maesil.kernels import gather, loss, unshuffle
from maesil.kernels.configs import by_rule

MOST = (2**31 - 1, 65_535, 65_535)
"""Blocks of a CUDA grid along its axes."""


class Recorder:
    """Stands where a kernel stands, and keeps the grids it is launched with."""

    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


@pytest.fixture
def grids(monkeypatch):
    found = []
    for module in (gather, loss, unshuffle):
        monkeypatch.setattr(module, "launch", by_rule)
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(found))
    return found


def far_away(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def ids_of(*shape):
    return far_away(*shape, dtype=torch.int64)


LOOKUP = {"window": (-1000.0, 1000.0), "mean": 0.3, "std": 0.2, "origin": None, "flip": None, "size": None}


@pytest.mark.parametrize(("batch", "patch", "edge"), [(4096, 8, 128), (64, 4, 256), (4, 64, 512), (1 << 16, 8, 16)])
def test_patches(grids, batch, patch, edge):
    tokens = (edge // patch) ** 3
    volume, ids = far_away(batch, edge, edge, edge, dtype=torch.int16), ids_of(batch, tokens // 2)
    gather.gather_patches(volume, ids, dtype=torch.bfloat16, patch_size=patch, **LOOKUP)
    pred = far_away(*ids.shape, patch**3)
    options = {"norm_patch": False, "eps": 1e-6, "weight": far_away(*ids.shape), "patch_size": patch, **LOOKUP}
    loss.masked_reconstruction_loss(pred, volume, ids, **options)
    loss.masked_reconstruction_loss_backward(far_away(), pred, volume, ids, **options)
    check(grids, launches=4)


@pytest.mark.parametrize(("batch", "tokens", "width"), [(4096, 4096, 512), (16, 1 << 18, 1024), (1 << 17, 64, 33)])
def test_tokens(grids, batch, tokens, width):
    ids, subset = ids_of(batch, tokens), ids_of(batch, tokens // 2)
    leaves = far_away(batch, tokens // 4, width), far_away(width), far_away(tokens, width)
    for chosen in (None, subset):
        unshuffle.unshuffle_tokens(*leaves, ids, chosen)
        grad = far_away(batch, tokens if chosen is None else tokens // 2, width)
        unshuffle.unshuffle_tokens_backward(grad, ids, chosen, tokens // 4)
    unshuffle.unshuffle_positions_backward(grad, subset, tokens)
    check(grids, launches=6)


def check(grids, launches):
    assert len(grids) == launches and max(math.prod(grid) for grid in grids) > 65_535
    for grid in grids:
        assert all(0 < blocks <= most for blocks, most in zip(grid, MOST, strict=False)), grid
