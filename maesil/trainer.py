"""A run in memory: one training step, one validation, one picture, one checkpoint."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maesil.checkpoint import save_checkpoint
from maesil.config import RunConfig
from maesil.data import Batch, Crop, CropLoader, CropSampler, Draw, patch_shares
from maesil.errors import MaesilError
from maesil.masked_input import MaskedInput
from maesil.masking import draw_targets, make_masks
from maesil.model import Prediction, ReconstructionModel
from maesil.optim import learning_rate, set_learning_rate, update_average
from maesil.patches import to_hu, unpatchify
from maesil.split import Split
from maesil.types import HuArray, Intensity, Window


@dataclass
class Trainer:
    """What is fixed in a run, and what a step changes: model, average, optimiser, step."""

    config: RunConfig
    device: torch.device
    store_fingerprints: tuple[str, ...]
    split: Split
    intensity: Intensity
    sampler: CropSampler
    validation: list[Crop]
    """Crops of the held-out patients; empty if nobody is held out."""
    model: ReconstructionModel
    optimizer: torch.optim.AdamW
    averaged: ReconstructionModel | None = None
    """The moving average of the model, if the run keeps one."""
    step: int = 0
    """Optimiser steps done."""
    _forward: Callable[[MaskedInput], Prediction] = field(init=False)

    def __post_init__(self) -> None:
        self.model.train()
        if self.config.train.ema and self.averaged is None:
            self.averaged = copy.deepcopy(self.model)
        self._forward = torch.compile(self.model) if self.config.train.compile else self.model

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

    def training_step(self, batch: Batch) -> dict[str, float]:
        """Take one step of AdamW; return its number, loss, learning rate and gradient norm (before clipping).

        MaesilError, before anything is changed, where loss or gradient are not finite.
        """
        settings = self.config.train
        inputs = self._training_input(batch)
        weight_BS = self._weights(patch_shares(batch.valid, inputs.patch, batch.flip), inputs)
        with self._autocast():
            prediction = self._forward(inputs)
        loss = total = inputs.loss(prediction.patches_BSV, weight_BS)
        if prediction.penalty is not None:
            total = loss + self.model.penalty_weight(self.step / settings.steps) * prediction.penalty
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        named = {"loss": loss.detach(), "grad_norm": norm, **prediction.facts}
        values = torch.stack([value.float() for value in named.values()]).tolist()  # one wait for the GPU
        record = {"step": self.step + 1, "lr": self.lr, **dict(zip(named, values, strict=True))}
        if not math.isfinite(sum(values)):
            raise MaesilError(self._blown_up(record, batch))
        set_learning_rate(self.optimizer, self.lr)
        self.optimizer.step()
        self.step += 1
        if self.averaged is not None:
            update_average(self.averaged, self.model, settings.ema, self.step)
        return record

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Score the held-out crops, masked by seeds that never change.

        ``validation_loss`` is the training loss, ``validation_psnr`` the PSNR over hidden valid voxels pooled over
        all crops (dB of the window's width).
        """
        error = total = 0.0
        model = self.final_model.eval()
        for start in range(0, len(self.validation), self.config.train.batch):
            crops = self.validation[start : start + self.config.train.batch]
            inputs = self._input(_stack([crop.hu for crop in crops]), range(start, start + len(crops)))
            weight_BS = self._weights(patch_shares(_stack([crop.valid for crop in crops]), inputs.patch), inputs)
            with self._autocast():
                patches_BSV = model(inputs).patches_BSV
            error += float(inputs.loss(patches_BSV, weight_BS)) * float(weight_BS.sum())
            total += float(weight_BS.sum())
        self.model.train()
        loss_value = error / total
        return {
            "validation_loss": loss_value,
            "validation_psnr": -10 * math.log10(loss_value * self.intensity.std**2),
        }

    @torch.no_grad()
    def draw_picture(self, path: Path) -> None:
        """Draw input, mask, reconstruction and error of one crop, of a held-out patient if there is one."""
        from maesil.pictures import save_reconstruction  # matplotlib: a second, and not every step

        hu = self._picture_crop()
        inputs, grid = self._input(torch.from_numpy(hu)[None], [0]), self.config.model.grid
        with self._autocast():
            tokens_BLV = self.final_model.eval().predict_all(inputs)
        self.model.train()
        prediction = unpatchify(to_hu(tokens_BLV.float(), self.intensity), grid, inputs.patch)[0].cpu().numpy()
        hidden = unpatchify(inputs.masks.mask[..., None].expand(-1, -1, inputs.patch**3), grid, inputs.patch)
        path.parent.mkdir(parents=True, exist_ok=True)
        window, title = self.intensity.window, f"step {self.step}"
        save_reconstruction(path, hu, hidden[0].cpu().numpy() > 0, prediction, window, title=title)

    def save(self, run_dir: Path) -> None:
        """Write the checkpoint of this step."""
        save_checkpoint(
            run_dir,
            model=self.model,
            averaged=self.averaged,
            optimizer=self.optimizer,
            step=self.step,
            intensity=self.intensity,
            config=self.config,
            split=self.split,
            store_fingerprints=self.store_fingerprints,
        )

    def _training_input(self, batch: Batch) -> MaskedInput:
        """Return a batch as the model sees it: mirrored, windowed and masked as its draws say."""
        model, settings = self.config.model, self.config.train
        seeds = [draw.mask_seed for draw in batch.draws]
        inputs = self._input(batch.hu, seeds)
        windows = _shifted_windows(settings.window, settings.window_jitter, batch.draws)
        lean = model.kind == "maesil" and model.decoder != "full"
        return MaskedInput(
            inputs.volume_BZYX, inputs.masks, self.intensity, model.patch,
            flip_B3=self._to_device(batch.flip),
            window_B2=self._to_device(windows) if settings.window_jitter else None,
            ids_target=draw_targets(inputs.masks, model.decoded, seeds) if lean else None,
        )  # fmt: skip

    def _input(self, hu: Tensor, mask_seeds: Sequence[int]) -> MaskedInput:
        config = self.config
        masks = make_masks(config.mask, config.model.grid, mask_seeds, self.device)
        return MaskedInput(self._to_device(hu), masks, self.intensity, config.model.patch)

    def _weights(self, shares_BL: Tensor, inputs: MaskedInput) -> Tensor:
        """Return what each predicted patch counts in the loss: its valid share, ``[B, S]``."""
        return self._to_device(shares_BL).gather(1, inputs.targets)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.on_gpu)

    def _picture_crop(self) -> HuArray:
        """Return the held-out crop with the most body, or the first that training sees."""
        if self.validation:
            return max(self.validation, key=lambda crop: int(crop.body.sum())).hu
        with CropLoader(self.sampler, batch=1, readers=1, ahead=0) as loader:
            hu: HuArray = next(loader.batches(0, 1)).hu[0].numpy()
        return hu

    def _blown_up(self, record: dict[str, float], batch: Batch) -> str:
        crops = "; ".join(str(draw) for draw in batch.draws)
        return (
            f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']} at learning rate "
            f"{record['lr']:.3g}; nothing of this step was kept. Lower train.lr and go on with --resume, or look "
            f"at its crops: {crops}"
        )


def _shifted_windows(window: Window, jitter: float, draws: Sequence[Draw]) -> Tensor:
    """Return one window a sample, its ends moved as the draws say: float32 ``[B, 2]`` HU."""
    reach = jitter * (window[1] - window[0])
    return torch.tensor([[end + reach * by for end, by in zip(window, d.window_shift, strict=True)] for d in draws])


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
