"""AdamW with decoupled weight decay on matrices only, a learning rate by step, a moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from maesil.config.schema import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Make AdamW (arXiv 1711.05101) over two groups, one kernel a step; the trainer sets the learning rate."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the parameters: matrices decay; biases, norms and the mask token (all of one axis) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of step 0, 1, ...: a linear warm-up, then half a cosine that ends near 0."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameter groups one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move averaged weights towards those of step 1, 2, ...: slowly by ``decay``, faster in the first steps.

    The share kept is ``min(decay, step / (step + 9))``, so that the random start is soon forgotten. Buffers are copied.
    """
    kept = min(decay, step / (step + 9))
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - kept)  # a few kernels, not hundreds
    for copied, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
        copied.copy_(buffer)
