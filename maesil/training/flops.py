"""Floating-point operations of a model, counted where they happen and equal on every device."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(work: Callable[[], object]) -> int:
    """Return the operations of matrix products and convolutions in some work, multiplications and additions apart.

    Attention is counted as its definition: the counter of torch 2.13 takes that of a CPU, being fused, for nothing,
    and that of a GPU with what its backward pass computes twice.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())
