"""Unshuffle tokens on a GPU, forward and backward, without atomics: every sum has one order.

A row is a token of the output, ``[B * S]`` of them (S = L without a subset). Its *source* is its place in the
sequence "visible, then hidden"; from N on it is hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maesil.kernels.configs import launch


@triton.jit
def _unshuffle_kernel(
    tokens, visible, mask_token, pos_embed, ids_restore, ids_subset, batch, positions, total_positions, shown,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program writes ``COLUMNS`` channels of ``ROWS`` tokens of one sample.

    Samples run fastest over the programs: those at work at one time share position codes, and read them once.
    """
    sample = (tl.program_id(0) % batch).to(tl.int64)
    place = tl.program_id(0) // batch * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live, wide = place < positions, channel < WIDTH
    inside = live[:, None] & wide[None, :]
    place = tl.minimum(place, positions - 1)
    position = place.to(tl.int64) if ids_subset is None else tl.load(ids_subset + sample * positions + place)
    source = tl.load(ids_restore + sample * total_positions + position)
    seen = source < shown

    kind = tokens.dtype.element_ty
    token = tl.load(
        visible + (sample * shown + source)[:, None] * WIDTH + channel[None, :], mask=inside & seen[:, None], other=0
    )
    mask = tl.load(mask_token + channel, mask=wide, other=0).to(kind)
    code = tl.load(pos_embed + position[:, None] * WIDTH + channel[None, :], mask=inside, other=0).to(kind)
    token = tl.where(seen[:, None], token, mask[None, :])
    value = token.to(tl.float32) + code.to(tl.float32)
    offset = (sample * positions + place)[:, None] * WIDTH + channel[None, :]
    tl.store(tokens + offset, value.to(kind), mask=inside)


@triton.jit
def _unshuffle_backward_kernel(
    grad_visible, hidden_sums, grad, sources, rows, positions, shown,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program sends ``STEPS * ROWS`` rows home: seen ones to their visible token, hidden ones into one sum.

    Without ``grad_visible`` it leaves the seen ones alone.
    """
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = channel < WIDTH
    hidden_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = row < rows
        source = tl.load(sources + row, mask=live, other=0)
        seen = source < shown
        wanted = live if grad_visible is not None else live & ~seen
        offset = row.to(tl.int64)[:, None] * WIDTH + channel[None, :]
        value = tl.load(grad + offset, mask=wanted[:, None] & wide[None, :], other=0)
        if grad_visible is not None:
            home = ((row // positions).to(tl.int64) * shown + source)[:, None] * WIDTH + channel[None, :]
            tl.store(grad_visible + home, value, mask=(live & seen)[:, None] & wide[None, :])
        hidden_sum += tl.where(seen[:, None], 0.0, value.to(tl.float32))
    sums = hidden_sums + tl.program_id(0).to(tl.int64) * WIDTH + channel
    tl.store(sums, tl.sum(hidden_sum, axis=0), mask=wide)


@triton.jit
def _sum_rows_kernel(sums, grad, order, bounds, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """One program adds the rows ``order[bounds[i]:bounds[i + 1]]``, in that order, to the sum ``i``."""
    group = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = channel < WIDTH
    total = tl.zeros((COLUMNS,), tl.float32)
    for place in range(tl.load(bounds + group), tl.load(bounds + group + 1)):
        row = tl.load(order + place)
        total += tl.load(grad + row * WIDTH + channel, mask=wide, other=0).to(tl.float32)
    tl.store(sums + group * WIDTH + channel, total.to(sums.dtype.element_ty), mask=wide)


def unshuffle_tokens(
    visible_BND: Tensor,
    mask_token_D: Tensor,
    pos_embed_LD: Tensor,
    ids_restore_BL: Tensor,
    ids_subset_BS: Tensor | None,
) -> Tensor:
    """Put visible tokens back in place: `maesil.kernels.reference.unshuffle_tokens`."""
    batch, positions = (ids_restore_BL if ids_subset_BS is None else ids_subset_BS).shape
    _, shown, width = visible_BND.shape
    tile = launch("unshuffle_forward", width)
    tokens = visible_BND.new_empty((batch, positions, width))
    if tokens.numel():
        _unshuffle_kernel[triton.cdiv(positions, tile.rows) * batch, triton.cdiv(width, tile.columns)](
            tokens, visible_BND.contiguous(), mask_token_D.contiguous(), pos_embed_LD.contiguous(),
            ids_restore_BL.contiguous(), None if ids_subset_BS is None else ids_subset_BS.contiguous(),
            batch, positions, ids_restore_BL.shape[1], shown,
            WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
        )  # fmt: skip
    return tokens


def unshuffle_tokens_backward(
    grad_BSD: Tensor, ids_restore_BL: Tensor, ids_subset_BS: Tensor | None, visible: int
) -> tuple[Tensor, Tensor]:
    """Gradients by visible tokens and mask token: `maesil.kernels.reference.unshuffle_tokens_backward`.

    Without a subset every row has a visible token of its own, or none: each row of ``ids_restore`` must be a
    permutation. A subset may name a position twice or never, so there the rows are sorted by their visible token.
    """
    batch, _, width = grad_BSD.shape
    grad_BSD = grad_BSD.contiguous()
    if ids_subset_BS is None:
        sources = ids_restore_BL.contiguous()
        grad_visible = grad_BSD.new_empty((batch, visible, width))
        return grad_visible, _send_home(grad_visible, grad_BSD, sources, visible)
    sources = ids_restore_BL.gather(1, ids_subset_BS)
    sample = torch.arange(batch, device=sources.device)[:, None]
    token = torch.where(sources < visible, sample * visible + sources, batch * visible)
    grad_visible = _sum_rows(grad_BSD, token.flatten(), batch * visible, grad_BSD.dtype)
    return grad_visible.view(batch, visible, width), _send_home(None, grad_BSD, sources, visible)


def unshuffle_positions_backward(grad_BSD: Tensor, ids_subset_BS: Tensor | None, tokens: int) -> Tensor:
    """Gradient by the position codes: `maesil.kernels.reference.unshuffle_positions_backward`."""
    if ids_subset_BS is None:
        return grad_BSD.sum(0, dtype=torch.float32)
    return _sum_rows(grad_BSD.contiguous(), ids_subset_BS.flatten(), tokens, torch.float32)


def _send_home(grad_visible: Tensor | None, grad: Tensor, sources: Tensor, shown: int) -> Tensor:
    """Fill ``grad_visible``, if given, and return the sum of the hidden rows, ``[D]`` float32."""
    positions, width = grad.shape[1:]
    rows, tile = sources.numel(), launch("unshuffle_backward", width)
    programs = triton.cdiv(rows, tile.rows * tile.steps)
    hidden_sums = grad.new_empty((programs, width), dtype=torch.float32)
    if programs:
        _unshuffle_backward_kernel[programs, triton.cdiv(width, tile.columns)](
            grad_visible, hidden_sums, grad, sources, rows, positions, shown,
            WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns, STEPS=tile.steps, num_warps=tile.warps,
        )  # fmt: skip
    return hidden_sums.sum(0)


def _sum_rows(grad: Tensor, group: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Sum the rows of each group 0 .. ``groups - 1`` in the order of the rows: ``[groups, D]`` of ``dtype``."""
    width = grad.shape[-1]
    tile = launch("unshuffle_subset", width)
    sorted_group, order = group.sort(stable=True)
    bounds = torch.searchsorted(sorted_group, torch.arange(groups + 1, device=grad.device))
    sums = grad.new_empty((groups, width), dtype=dtype)
    if sums.numel():
        _sum_rows_kernel[groups, triton.cdiv(width, tile.columns)](
            sums, grad, order, bounds, WIDTH=width, COLUMNS=tile.columns, num_warps=tile.warps
        )
    return sums
