"""AdamW, or Muon for the matrices of the transformer; a learning rate by step; a moving average of the weights.

Weight decay is decoupled, and on matrices only.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maesil.config.schema import TrainConfig
from maesil.training.muon import Muon


class Optimizers:
    """Several optimisers, each of its own parameters, that step as one."""

    found_inf: Tensor | None = None
    """1 on the device if the gradient is not finite: the step then leaves the parameters as they are."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """What each parameter's optimiser remembers of it."""
        return {parameter: own for optimizer in self.optimizers for parameter, own in optimizer.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Take one step with each, unless the gradient is not finite."""
        broken = self.found_inf
        parameters = [one for group in self.param_groups for one in group["params"]]
        before = [] if broken is None else [one.detach().clone() for one in parameters]
        for optimizer in self.optimizers:
            optimizer.step()
        if broken is not None:  # only the fused AdamW looks at it by itself, and to look from here would mean to wait
            for one, kept in zip(parameters, before, strict=True):
                torch.where(broken > 0, kept, one.data, out=one.data)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all of them, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the states that `state_dict` returned."""
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


Optimizer = torch.optim.Optimizer | Optimizers


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Make AdamW over all parameters, or Muon over the matrices of the blocks and AdamW over the rest.

    AdamW (arXiv 1711.05101) takes one kernel a step. `Muon` moves an entry as far as AdamW would: both share one
    learning rate. The trainer sets it.
    """
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    muon = [one for name, one in trained if config.optimizer == "muon" and one.ndim == 2 and "blocks." in name]
    chosen = {id(one) for one in muon}
    groups = parameter_groups([one for _, one in trained if id(one) not in chosen], config.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if not muon:
        return adamw
    return Optimizers(Muon(muon, config.lr, config.weight_decay), adamw)


def parameter_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Split parameters: matrices decay; biases, norms and the mask token (all of one axis) do not."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Schedule(Protocol):
    """What the learning rate hangs on: `TrainConfig`, or the budget of fine-tuning."""

    @property
    def lr(self) -> float:
        """The highest rate."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""

    @property
    def warmup(self) -> float:
        """Share of the steps in which the rate rises."""


def learning_rate(step: int, schedule: Schedule) -> float:
    """Return the rate of step 0, 1, ...: a linear warm-up up to ``lr``, then half a cosine that ends near 0."""
    warmup = round(schedule.warmup * schedule.steps)
    if step < warmup:
        return schedule.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, schedule.steps - warmup)
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
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
