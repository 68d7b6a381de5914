"""Runs of small, untrained models for tests, as training would leave them."""

from __future__ import annotations

from pathlib import Path

import torch

from maesil.config.schema import MaskConfig, ModelConfig, RunConfig
from maesil.data.split import Split
from maesil.models.registry import make_model
from maesil.training.checkpoint import save_checkpoint
from maesil.types import Intensity

SMALL = ModelConfig(crop=32, patch=8, width=48, depth=1, decoder_width=48, decoder_depth=1)


def save_run(path: Path, split: Split, model: ModelConfig = SMALL, mask: MaskConfig | None = None) -> Path:
    """A run of an untrained model, of 32^3 crops and 8^3 patches by default."""
    config = RunConfig(model, mask or MaskConfig())
    untrained = make_model(model)
    untrained.init_weights(torch.Generator().manual_seed(0))
    path.mkdir()
    save_checkpoint(
        path,
        model=untrained,
        optimizer=torch.optim.AdamW(untrained.parameters()),
        step=3,
        intensity=Intensity(mean=0.4, std=0.3),
        config=config,
        split=split,
        store_fingerprints=(),
    )
    return path
