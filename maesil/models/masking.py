"""Masks over the token grid: which patches the encoder sees, in MAE's own names.

Shapes: B samples, L tokens of the grid (gz, gy, gx), N visible, M hidden, S chosen; ``mask`` is 1 where hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maesil.config.schema import MaskConfig, hidden_count
from maesil.types import Zyx


@dataclass(frozen=True)
class Masks:
    """The masks of a batch; ids are int64 token numbers ``(iz * gy + iy) * gx + ix``, ascending."""

    ids_keep: Tensor
    """``[B, N]``: the visible tokens."""
    ids_masked: Tensor
    """``[B, M]``: the tokens to be predicted: the hidden ones, or all where nothing is hidden (kind ``none``)."""
    ids_restore: Tensor
    """``[B, L]``: where each token stands in the sequence "visible, then hidden"."""
    mask: Tensor
    """``[B, L]`` float32: 1 where a token is to be predicted."""

    def to(self, device: torch.device | str) -> Masks:
        """Return the masks on another device."""
        return Masks(*(ids.to(device) for ids in (self.ids_keep, self.ids_masked, self.ids_restore, self.mask)))


def make_masks(config: MaskConfig, grid: Zyx, seeds: Sequence[int], device: torch.device | str = "cpu") -> Masks:
    """Draw one mask a seed. Equal seeds give equal masks on every device; every sample hides equally many.

    The kinds are explained, with pictures, in ``docs/explanation/masking.md``. *Dual* masking is MAESIL's (arXiv
    2604.00514; the ratios are ours): a plane mask hides a share of the (y, x) positions in all z layers alike, an axis
    mask lets each z layer hide a share of the positions left.
    """
    if config.kind == "none":
        return _nothing_hidden(len(seeds), grid).to(device)
    nothing_wanted = torch.zeros(grid[0], grid[1] * grid[2], dtype=torch.bool)
    hidden = [_KINDS[config.kind](config, grid, _generator(seed), nothing_wanted) for seed in seeds]
    return masks_from_hidden(torch.stack(hidden).flatten(1)).to(device)


def complementary_masks(
    config: MaskConfig, grid: Zyx, seeds: Sequence[int], device: torch.device | str = "cpu"
) -> list[Masks]:
    """Draw masks until each token was hidden at least once: a list of passes, each a batch of one mask a seed.

    The first pass is that of `make_masks`. Every later one is of the same kind and hides exactly as many, but wherever
    it chooses, it takes first what was never hidden and only then draws at random. Two passes do for every kind that
    hides half of its columns; ``none`` has the one pass it has.
    """
    if config.kind == "none":
        return [make_masks(config, grid, seeds, device)]
    generators = [_generator(seed) for seed in seeds]
    wanted = torch.ones(len(seeds), grid[0], grid[1] * grid[2], dtype=torch.bool)
    passes = []
    while wanted.any():
        draws = [_KINDS[config.kind](config, grid, *sample) for sample in zip(generators, wanted, strict=True)]
        hidden = torch.stack(draws)
        wanted &= ~hidden
        passes.append(masks_from_hidden(hidden.flatten(1)).to(device))
    return passes


def masks_from_hidden(hidden_BL: Tensor) -> Masks:
    """Return the masks of a boolean ``[B, L]`` (True = hidden); each sample must hide equally many tokens."""
    count = int(hidden_BL[0].sum())
    if not torch.equal(hidden_BL.sum(dim=1), torch.full((len(hidden_BL),), count)):
        raise ValueError(f"every sample must hide equally many tokens, found {hidden_BL.sum(dim=1).tolist()}")
    # A stable sort of "hidden" keeps both parts in the order of the grid.
    ids_shuffle = torch.argsort(hidden_BL.to(torch.uint8), dim=1, stable=True)
    keep = hidden_BL.shape[1] - count
    return Masks(
        ids_keep=ids_shuffle[:, :keep].contiguous(),
        ids_masked=ids_shuffle[:, keep:].contiguous(),
        ids_restore=torch.argsort(ids_shuffle, dim=1),
        mask=hidden_BL.float(),
    )


def draw_targets(masks: Masks, share: float, seeds: Sequence[int]) -> Tensor:
    """Draw which hidden tokens a lean decoder predicts in one step: ``[B, S]``, ascending, one seed a sample."""
    hidden = masks.ids_masked.shape[1]
    count = max(1, hidden_count(share, hidden))
    all_alike = torch.zeros(hidden, dtype=torch.bool)
    chosen = torch.stack([_random_order(all_alike, _generator(seed))[:count].sort().values for seed in seeds])
    return masks.ids_masked.gather(1, chosen.to(masks.ids_masked.device))


def draw_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Draw standard normal numbers, float32 ``[B, *shape]``, one seed a sample."""
    # Not the mask's own stream.
    return torch.stack([torch.randn(tuple(shape), generator=_generator(seed ^ 1)) for seed in seeds])


def _nothing_hidden(samples: int, grid: Zyx) -> Masks:
    ids_BL = torch.arange(grid[0] * grid[1] * grid[2]).expand(samples, -1).contiguous()
    return Masks(ids_BL, ids_BL, ids_BL, torch.ones(ids_BL.shape))


# Each kind returns what it hides, bool [gz, gy * gx]; ``wanted``, of the same shape, says what to hide first.


def _dual(config: MaskConfig, grid: Zyx, generator: torch.Generator, wanted: Tensor) -> Tensor:
    """Hide whole columns, and in each layer by itself a share of what is left."""
    gz, gy, gx = grid
    columns = _random_order(wanted.sum(dim=0), generator)
    in_plane = hidden_count(config.plane, gy * gx)
    left = columns[in_plane:]
    order_per_layer = _random_order(wanted[:, left], generator)
    in_layer = left[order_per_layer[:, : hidden_count(config.axis, len(left))]]
    hidden = torch.zeros(gz, gy * gx, dtype=torch.bool)
    hidden[:, columns[:in_plane]] = True
    return hidden.scatter_(1, in_layer, True)


def _random(config: MaskConfig, grid: Zyx, generator: torch.Generator, wanted: Tensor) -> Tensor:
    """Hide a share of all tokens."""
    hidden = torch.zeros(wanted.numel(), dtype=torch.bool)
    hidden[_random_order(wanted.flatten(), generator)[: hidden_count(config.share, wanted.numel())]] = True
    return hidden.view_as(wanted)


def _tube(config: MaskConfig, grid: Zyx, generator: torch.Generator, wanted: Tensor) -> Tensor:
    """Hide whole columns."""
    gz, gy, gx = grid
    hidden = torch.zeros(gz, gy * gx, dtype=torch.bool)
    hidden[:, _random_order(wanted.sum(dim=0), generator)[: hidden_count(config.plane, gy * gx)]] = True
    return hidden


def _slab(config: MaskConfig, grid: Zyx, generator: torch.Generator, wanted: Tensor) -> Tensor:
    """Hide whole columns, and whole axial layers."""
    hidden = _tube(config, grid, generator, wanted)
    layers = _random_order((wanted & ~hidden).sum(dim=1), generator)
    hidden[layers[: hidden_count(config.axis, grid[0])]] = True
    return hidden


_KINDS: dict[str, Callable[[MaskConfig, Zyx, torch.Generator, Tensor], Tensor]] = {
    "dual": _dual,
    "random": _random,
    "tube": _tube,
    "slab": _slab,
}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random_order(wanted: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random permutation along the last axis, what is wanted most coming first."""
    at_random = torch.rand(wanted.shape, generator=generator).argsort(dim=-1, stable=True)
    return at_random.gather(-1, wanted.gather(-1, at_random).argsort(dim=-1, descending=True, stable=True))
