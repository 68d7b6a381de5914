"""A run in memory: one training step, one validation, one picture, one checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maesil.checkpoint import save_checkpoint
from maesil.config import RunConfig
from maesil.data import Batch, Crop, CropLoader, CropSampler, Split, patch_shares
from maesil.errors import MaesilError
from maesil.masking import Masks, make_masks
from maesil.model import MaskedAutoencoder, to_hu, unpatchify
from maesil.optim import learning_rate, set_learning_rate
from maesil.types import HuArray, Intensity


@dataclass
class Trainer:
    """What is fixed in a run, and the three things a step changes: model, optimiser, step."""

    config: RunConfig
    device: torch.device
    store_fingerprints: tuple[str, ...]
    split: Split
    intensity: Intensity
    sampler: CropSampler
    validation: list[Crop]
    """Crops of the held-out patients; empty if nobody is held out."""
    model: MaskedAutoencoder
    optimizer: torch.optim.AdamW
    step: int = 0
    """Optimiser steps done."""

    @property
    def on_gpu(self) -> bool:
        """Whether to autocast to bfloat16 and to pin host memory."""
        return self.device.type == "cuda"

    @property
    def lr(self) -> float:
        """The learning rate of the coming step."""
        return learning_rate(self.step, self.config.train)

    def training_step(self, batch: Batch) -> dict[str, float]:
        """Take one step of AdamW; return its number, loss, learning rate and gradient norm (before clipping).

        MaesilError, before anything is changed, where loss or gradient are not finite.
        """
        shares = patch_shares(batch.valid, self.config.model.patch, batch.flip)
        hu, flip, shares = self._to_device(batch.hu, batch.flip, shares)
        loss, _ = self._loss(hu, self._masks([draw.mask_seed for draw in batch.draws]), shares, flip)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip)
        loss_value, norm_value = torch.stack([loss.detach(), norm]).tolist()  # one wait for the GPU
        record = {"step": self.step + 1, "loss": loss_value, "lr": self.lr, "grad_norm": norm_value}
        if not math.isfinite(loss_value + norm_value):
            raise MaesilError(self._blown_up(record, batch))
        set_learning_rate(self.optimizer, self.lr)
        self.optimizer.step()
        self.step += 1
        return record

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Score the held-out crops, masked by seeds that never change.

        ``validation_loss`` is the training loss, ``validation_psnr`` the PSNR over hidden valid voxels pooled over
        all crops (dB of the window's width).
        """
        error = total = 0.0
        for start in range(0, len(self.validation), self.config.train.batch):
            crops = self.validation[start : start + self.config.train.batch]
            shares = patch_shares(_stack([crop.valid for crop in crops]), self.config.model.patch)
            hu, shares = self._to_device(_stack([crop.hu for crop in crops]), shares)
            loss, weight_BM = self._loss(hu, self._masks(range(start, start + len(crops))), shares)
            error += float(loss) * float(weight_BM.sum())
            total += float(weight_BM.sum())
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
        masks, (grid, patch) = self._masks([0]), (self.config.model.grid, self.config.model.patch)
        (volume,) = self._to_device(torch.from_numpy(hu)[None])
        with self._autocast():
            tokens_BLV = self.model.predict_all(volume, masks, self.intensity)
        prediction = unpatchify(to_hu(tokens_BLV.float(), self.intensity), grid, patch)[0].cpu().numpy()
        hidden = unpatchify(masks.mask[..., None].expand(-1, -1, patch**3), grid, patch)[0].cpu().numpy() > 0
        path.parent.mkdir(parents=True, exist_ok=True)
        save_reconstruction(path, hu, hidden, prediction, self.intensity.window, title=f"step {self.step}")

    def save(self, run_dir: Path) -> None:
        """Write the checkpoint of this step."""
        save_checkpoint(
            run_dir,
            model=self.model,
            optimizer=self.optimizer,
            step=self.step,
            intensity=self.intensity,
            config=self.config,
            split=self.split,
            store_fingerprints=self.store_fingerprints,
        )

    def _loss(self, hu: Tensor, masks: Masks, shares_BL: Tensor, flip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss over hidden patches, and their weights ``[B, M]``: the valid share of each."""
        weight_BM = shares_BL.gather(1, masks.ids_masked)
        with self._autocast():
            pred_BMV = self.model(hu, masks, self.intensity, flip)
        return self.model.forward_loss(pred_BMV, hu, masks, self.intensity, weight_BM, flip), weight_BM

    def _masks(self, seeds: Sequence[int]) -> Masks:
        return make_masks(self.config.mask, self.config.model.grid, seeds, self.device)

    def _to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

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


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
