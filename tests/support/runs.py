"""Runs of small, untrained models for tests, as training would leave them."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from maesil.config.schema import MaskConfig, ModelConfig, RunConfig
from maesil.data.split import Split
from maesil.models.registry import make_model
from maesil.training.checkpoint import save_checkpoint
from maesil.training.log import RunLog
from maesil.training.train import train
from maesil.types import Intensity

SMALL = ModelConfig(crop=32, patch=8, width=48, depth=1, decoder_width=48, decoder_depth=1)


def save_run(
    path: Path, split: Split, model: ModelConfig = SMALL, mask: MaskConfig | None = None, *, dead: bool = False
) -> Path:
    """A run of an untrained model, of 32^3 crops and 8^3 patches by default; ``dead``: its encoder is not used."""
    config = RunConfig(model, mask or MaskConfig())
    untrained = make_model(model)
    untrained.init_weights(torch.Generator().manual_seed(0))
    if dead:
        torch.nn.init.zeros_(untrained.decoder_embed.weight)
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


def interrupted_after(step: int, stores: Sequence[Path], config: RunConfig, out: Path, **options: Any) -> str:
    """Train for some steps, then send SIGINT; return what was told."""
    console, show = Console(file=io.StringIO(), width=300), RunLog.show

    def stop(log: RunLog, at: int, loss: float) -> None:
        show(log, at, loss)
        if at >= step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunLog, "show", stop)
        train(stores, config, out, console=console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]
