"""Masks over the token grid: which patches the encoder sees, in MAE's own names.

Shapes: B samples, L tokens of the grid (gz, gy, gx), N visible, M hidden, S chosen; ``mask`` is 1 where hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maesil.config.schema import MaskConfig, hidden_count
from maesil.devices import sent
from maesil.types import Zyx

Generators = Sequence[torch.Generator]


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
        """Return the masks on another device, see `maesil.devices.sent`."""
        return Masks(*(sent(ids, device) for ids in (self.ids_keep, self.ids_masked, self.ids_restore, self.mask)))

    def of(self, samples: slice) -> Masks:
        """Return the masks of some samples."""
        return Masks(*(ids[samples] for ids in (self.ids_keep, self.ids_masked, self.ids_restore, self.mask)))


def make_masks(config: MaskConfig, grid: Zyx, seeds: Sequence[int], device: torch.device | str = "cpu") -> Masks:
    """Draw one mask a seed. Equal seeds give equal masks on every device; every sample hides equally many.

    The kinds are explained, with pictures, in ``docs/explanation/masking.md``. *Dual* masking is MAESIL's (arXiv
    2604.00514; the ratios are ours): a plane mask hides a share of the (y, x) positions in all z layers alike, an axis
    mask lets each z layer hide a share of the positions left.
    """
    if config.kind == "none":
        return _nothing_hidden(len(seeds), grid).to(device)
    hidden = _KINDS[config.kind](config, grid, _generators(seeds), None)
    return masks_from_hidden(hidden.flatten(1)).to(device)


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
    generators = _generators(seeds)
    wanted = torch.ones(len(seeds), grid[0], grid[1] * grid[2], dtype=torch.bool)
    passes = []
    while wanted.any():
        hidden = _KINDS[config.kind](config, grid, generators, wanted)
        wanted &= ~hidden
        passes.append(masks_from_hidden(hidden.flatten(1)).to(device))
    return passes


def masks_from_hidden(hidden_BL: Tensor) -> Masks:
    """Return the masks of a boolean ``[B, L]`` (True = hidden); each sample must hide equally many tokens."""
    counts = hidden_BL.sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"every sample must hide equally many tokens, found {counts}")
    return masks_of_equal_count(hidden_BL, counts[0])


def masks_of_equal_count(hidden_BL: Tensor, count: int) -> Masks:
    """Return the masks of a boolean ``[B, L]`` of which it is known that each sample hides ``count`` tokens.

    No value is looked at, so that a GPU is not waited for.
    """
    hidden_so_far, (samples, tokens) = hidden_BL.cumsum(dim=1), hidden_BL.shape
    position = torch.arange(tokens, device=hidden_BL.device).expand(samples, -1)
    keep = tokens - count
    # Both parts stay in the order of the grid, so a token's place is the number of its own kind before it.
    ids_restore = torch.where(hidden_BL, keep - 1 + hidden_so_far, position - hidden_so_far)
    ids_shuffle = torch.empty_like(ids_restore).scatter_(1, ids_restore, position)
    return Masks(
        ids_keep=ids_shuffle[:, :keep].contiguous(),
        ids_masked=ids_shuffle[:, keep:].contiguous(),
        ids_restore=ids_restore,
        mask=hidden_BL.float(),
    )


def draw_targets(masks: Masks, share: float, seeds: Sequence[int]) -> Tensor:
    """Draw which hidden tokens a lean decoder predicts in one step: ``[B, S]``, ascending, one seed a sample."""
    hidden = masks.ids_masked.shape[1]
    count = max(1, hidden_count(share, hidden))
    chosen = _chosen(count, (hidden,), _generators(seeds)).nonzero()[:, 1].view(-1, count)
    return masks.ids_masked.gather(1, sent(chosen, masks.ids_masked.device))


def draw_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Draw standard normal numbers, float32 ``[B, *shape]``, one seed a sample."""
    # Not the mask's own stream.
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in _generators([seed ^ 1 for seed in seeds])])


def _nothing_hidden(samples: int, grid: Zyx) -> Masks:
    ids_BL = torch.arange(grid[0] * grid[1] * grid[2]).expand(samples, -1).contiguous()
    return Masks(ids_BL, ids_BL, ids_BL, torch.ones(ids_BL.shape))


# Each kind returns what it hides, bool [B, gz, gy * gx]; ``wanted``, of the same shape, says what to hide first.


def _dual(config: MaskConfig, grid: Zyx, generators: Generators, wanted: Tensor | None) -> Tensor:
    """Hide whole columns, and in each layer by itself a share of what is left."""
    gz, gy, gx = grid
    columns = _random_order((gy * gx,), generators, None if wanted is None else wanted.sum(dim=1))
    in_plane = hidden_count(config.plane, gy * gx)
    left = columns[:, None, in_plane:].expand(-1, gz, -1)
    in_layer = hidden_count(config.axis, left.shape[2])
    chosen = _chosen(in_layer, left.shape[1:], generators, None if wanted is None else wanted.gather(2, left))
    return torch.ones(len(generators), gz, gy * gx, dtype=torch.bool).scatter_(2, left, chosen)


def _random(config: MaskConfig, grid: Zyx, generators: Generators, wanted: Tensor | None) -> Tensor:
    """Hide a share of all tokens."""
    gz, gy, gx = grid
    tokens = gz * gy * gx
    wanted = None if wanted is None else wanted.flatten(1)
    return _chosen(hidden_count(config.share, tokens), (tokens,), generators, wanted).view(-1, gz, gy * gx)


def _tube(config: MaskConfig, grid: Zyx, generators: Generators, wanted: Tensor | None) -> Tensor:
    """Hide whole columns."""
    gz, gy, gx = grid
    wanted = None if wanted is None else wanted.sum(dim=1)
    columns = _chosen(hidden_count(config.plane, gy * gx), (gy * gx,), generators, wanted)
    return columns[:, None].expand(-1, gz, -1)


def _slab(config: MaskConfig, grid: Zyx, generators: Generators, wanted: Tensor | None) -> Tensor:
    """Hide whole columns, and whole axial layers."""
    hidden = _tube(config, grid, generators, wanted)
    wanted = None if wanted is None else (wanted & ~hidden).sum(dim=2)
    layers = _chosen(hidden_count(config.axis, grid[0]), grid[:1], generators, wanted)
    return hidden | layers[..., None]


_KINDS: dict[str, Callable[[MaskConfig, Zyx, Generators, Tensor | None], Tensor]] = {
    "dual": _dual,
    "random": _random,
    "tube": _tube,
    "slab": _slab,
}


def _generators(seeds: Sequence[int]) -> Generators:
    """Return one generator a sample, so that a mask follows from its own seed, whoever it is drawn with."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _random_order(shape: Sequence[int], generators: Generators, wanted: Tensor | None = None) -> Tensor:
    """Draw random permutations along the last axis, int64 ``[B, *shape]``, what is wanted most coming first."""
    at_random = _drawn(shape, generators).argsort(dim=-1, stable=True)
    if wanted is None:
        return at_random
    return at_random.gather(-1, wanted.gather(-1, at_random).argsort(dim=-1, descending=True, stable=True))


def _chosen(count: int, shape: Sequence[int], generators: Generators, wanted: Tensor | None = None) -> Tensor:
    """Draw the first ``count`` of each of those permutations, as a bool ``[B, *shape]``."""
    if wanted is not None or count == 0:
        order = _random_order(shape, generators, wanted)
        return torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order[..., :count], True)
    drawn = _drawn(shape, generators)
    last = torch.from_numpy(np.partition(drawn.numpy(), count - 1)[..., count - 1, None])  # a tenth of a sort's time
    below, equal = drawn < last, drawn == last
    # Equal numbers are rare, and a stable sort would leave them in the order of the grid.
    return below | (equal & (below.sum(dim=-1, keepdim=True) + equal.cumsum(dim=-1) <= count))


def _drawn(shape: Sequence[int], generators: Generators) -> Tensor:
    return torch.stack([torch.rand(tuple(shape), generator=generator) for generator in generators])
