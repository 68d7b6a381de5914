"""One optimiser step, wherever its crops come from: forward, loss, backward, clip, AdamW, average.

A step is one of the whole batch, however it is dealt out: the weights of its patches are summed over all ranks and
micro-batches first, so that the loss and gradient of each enter with their share of the exact weighted mean.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from maesil.config.schema import RunConfig
from maesil.distributed import Ranks, current
from maesil.errors import MaesilError
from maesil.models.masked_autoencoder import Prediction, ReconstructionModel
from maesil.models.masked_input import MaskedInput
from maesil.training.optim import Optimizer, learning_rate, set_learning_rate, update_average


@dataclass(frozen=True)
class MicroBatch:
    """Crops that go through the model at once: a rank's share of a step, or a part of it."""

    inputs: MaskedInput
    weight_BS: Tensor
    """What each predicted patch counts in the loss."""
    picture_weight_BS: Tensor
    """The same for the patches of the crops that are pictured (``inputs.pictured``), for the picture head."""


@dataclass(frozen=True)
class _Unread:
    """A step whose numbers are still on the device."""

    number: int
    lr: float
    names: tuple[str, ...]
    values: Tensor
    crops: str


@dataclass(kw_only=True)
class Learner:
    """A model on its way: what a step changes, and the step."""

    config: RunConfig
    device: torch.device
    model: ReconstructionModel
    optimizer: Optimizer
    averaged: ReconstructionModel | None = None
    """The moving average of the model, if the run keeps one."""
    step: int = 0
    """Optimiser steps done."""
    ranks: Ranks = field(default_factory=current)
    _unread: list[_Unread] = field(init=False, default_factory=list)
    _broken: Tensor = field(init=False)
    """1 on the device from the first step on whose loss or gradient is not finite; such steps change nothing."""
    _forward: Callable[[MaskedInput], Prediction] = field(init=False)
    _parallel: DistributedDataParallel | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.model.train()
        self.model.activation_checkpointing = self.config.train.activation_checkpointing
        self._broken = torch.zeros((), device=self.device)
        if self.config.train.ema and self.averaged is None:
            self.averaged = copy.deepcopy(self.model)
        forward: Callable[[MaskedInput], Prediction] = self.model
        if self.ranks.count > 1:
            # Buffers are alike on all ranks already: codebooks follow sums over them.
            with warnings.catch_warnings():
                # What is to replace it came with torch 2.13.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                forward = self._parallel = DistributedDataParallel(
                    self.model, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        self._forward = self._compiled(forward) if self.config.train.compile else forward

    def _compiled(self, forward: Callable[[MaskedInput], Prediction]) -> Callable[[MaskedInput], Prediction]:
        """Compile a model: one graph for each place that the first pictured crop of a micro-batch can have.

        Beyond its limit torch would go on uncompiled, and say nothing.
        """
        import torch._dynamo  # a second, and only here

        graphs, settings = self.config.train.picture_head_every + 1, torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, graphs)
        return torch.compile(forward)

    @property
    def on_gpu(self) -> bool:
        """Whether to autocast to bfloat16 and to pin host memory."""
        return self.device.type == "cuda"

    @property
    def lr(self) -> float:
        """The learning rate of the coming step."""
        return learning_rate(self.step, self.config.train)

    @property
    def final_model(self) -> ReconstructionModel:
        """The model that is scored and used: the average, if there is one."""
        return self.averaged or self.model

    def learn(self, micro_batches: Sequence[MicroBatch], crops: str = "") -> None:
        """Take one step, without waiting for the device; `read` tells what it came to.

        All ranks call it with equally many micro-batches of equally many crops. From a step on whose loss or gradient
        is not finite nothing is changed: the device sees to it, and `read` raises.
        """
        self.optimizer.zero_grad(set_to_none=True)
        facts = self._backward(micro_batches)
        named = {"loss": facts.pop("loss"), **self._clip_gradients(), **facts}
        values = torch.stack(list(named.values()))
        self._unread.append(_Unread(self.step + 1, self.lr, tuple(named), values, crops))
        self._broken = torch.maximum(self._broken, (~values.sum().isfinite()).float())
        self.optimizer.found_inf = self._broken  # type: ignore[union-attr]  # the fused AdamW then changes nothing
        set_learning_rate(self.optimizer, self.lr)
        self.optimizer.step()
        self.step += 1
        if self.averaged is not None:
            update_average(self.averaged, self.model, self.config.train.ema, self.step)

    def read(self) -> dict[str, float]:
        """Wait for the device; return the last step's number, learning rate, loss and gradient norm (before clipping).

        An empty record if nothing was learnt since the last reading.

        MaesilError for the first step since the last reading whose loss or gradient is not finite; it names all ranks'
        crops. All ranks call it after the same steps; a checkpoint is written after a reading only.
        """
        unread, self._unread = self._unread, []
        record: dict[str, float] = {}
        if not unread:
            return record
        for step, values in zip(unread, torch.stack([one.values for one in unread]).tolist(), strict=True):
            record = {"step": step.number, "lr": step.lr, **dict(zip(step.names, values, strict=True))}
            if not math.isfinite(sum(values)):
                raise MaesilError(_blown_up(record, self.ranks.gather(step.crops)))
        return record

    def _backward(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """Leave the gradient of the step in the parameters; return its loss and facts, over all ranks."""
        shares = self._shares([one.weight_BS for one in micro_batches])
        picture_shares = self._shares([one.picture_weight_BS for one in micro_batches])
        parts = len(micro_batches) * self.ranks.count
        sums: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with nullcontext() if last or self._parallel is None else self._parallel.no_sync():
                with self.autocast():
                    prediction = self._forward(micro_batch.inputs)
                loss = micro_batch.inputs.loss(prediction.patches_BSV, micro_batch.weight_BS) * shares[number]
                pictures = picture_loss(prediction, micro_batch) * picture_shares[number]
                total: Tensor = loss + pictures + self._auxiliary_loss(prediction) / parts
                # Gradients are averaged over ranks, ours are shares of a sum.
                (total * self.ranks.count).backward()  # type: ignore[no-untyped-call]
            means = {name: fact.float() / parts for name, fact in prediction.facts.items()}
            for name, value in {"loss": loss.detach(), **means}.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
        return dict(zip(sums, self.ranks.sum(torch.stack(list(sums.values()))).unbind(), strict=True))

    def _clip_gradients(self) -> dict[str, Tensor]:
        """Shorten the gradient of the model, and by itself that of what learns beside it; return their norms."""
        beside, clip = self.model.trained_beside, self.config.train.clip
        others = list(beside.parameters()) if beside is not None else []
        apart = {id(one) for one in others}
        own = [one for one in self.model.parameters() if id(one) not in apart]
        norms = {"grad_norm": torch.nn.utils.clip_grad_norm_(own, clip).float()}
        if others:
            norms["picture_grad_norm"] = torch.nn.utils.clip_grad_norm_(others, clip).float()
        return norms

    def _shares(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the share of each micro-batch in the weight of the step, over all ranks."""
        sums = torch.stack([one.sum(dtype=torch.float64) for one in weights])
        total = self.ranks.sum(sums.sum()).clamp_min(torch.finfo(torch.float64).tiny)
        return (sums / total).float()

    def _auxiliary_loss(self, prediction: Prediction) -> Tensor | float:
        if prediction.auxiliary_loss is None:
            return 0.0
        return self.model.auxiliary_weight(self.step / self.config.train.steps) * prediction.auxiliary_loss

    def autocast(self) -> torch.autocast:
        """Return the context in which a model predicts: bfloat16 on a GPU."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.on_gpu)


def picture_loss(prediction: Prediction, micro_batch: MicroBatch) -> Tensor | float:
    """Return the loss of the picture head on the crops that it drew; its gradient stays in the head."""
    if prediction.pictured_BSV is None or micro_batch.inputs.pictured is None:
        return 0.0
    drawn = micro_batch.inputs.of(micro_batch.inputs.pictured)
    return drawn.loss(prediction.pictured_BSV, micro_batch.picture_weight_BS)


def _blown_up(record: dict[str, float], crops: Sequence[str]) -> str:
    return (
        f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']} at learning rate "
        f"{record['lr']:.3g}; nothing of it was kept. Lower train.lr and go on with --resume, or look "
        f"at its crops: {'; '.join(crops)}"
    )
