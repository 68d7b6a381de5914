"""What a model costs: parameters, floating-point operations, size of its code."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maesil.config.schema import RunConfig
from maesil.models.masked_autoencoder import ReconstructionModel
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.training.flops import count_flops
from maesil.types import Intensity


@dataclass(frozen=True)
class Cost:
    """Of one model."""

    parameters: int
    gflop: float
    """Of the forward pass of one crop, multiplications and additions counted apart (10^9)."""
    latent_per_voxel: float
    """Numbers of the latent code for each voxel, nothing being hidden."""


@torch.no_grad()
def measure_cost(model: ReconstructionModel, config: RunConfig, intensity: Intensity) -> Cost:
    """Count by running one crop of air through the model, masked as in training."""
    device = next(model.parameters()).device
    volume = torch.full((1, *config.model.crop_zyx), -1000, dtype=torch.int16, device=device)
    masks = make_masks(config.mask, config.model.grid, [0], device)
    flops = count_flops(lambda: model(MaskedInput(volume, masks, intensity, config.model.patch)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, flops / 1e9, model.latent_per_voxel)
