"""Which configuration a run starts from where none is named: by the device and the store, or the run's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from maesil.config.presets import PRESETS
from maesil.config.schema import RunConfig
from maesil.config.toml import load_config
from maesil.errors import UsageError
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.text import counted
from maesil.training.checkpoint import has_checkpoint
from maesil.training.leftover import CONFIG

_MANY_VOLUMES = 100
"""From so many on, ``base`` in place of ``small`` (ours)."""


def starting_point(
    stores: Sequence[StorePlace], out: Path, device: torch.device, *, resume: bool
) -> tuple[RunConfig, str]:
    """Return the configuration that options are laid over where no preset is named, and a line that says why.

    A run that goes on, or was begun and took no step, starts from its own configuration. Presets too large for a CPU
    are never chosen for it.
    """
    own, of_the_run = out / CONFIG, f"the configuration is that of {out}"
    if resume and own.exists():
        if has_checkpoint(out):
            return load_config(file=own), of_the_run
        with suppress(UsageError):  # what is damaged is told as the run begins
            return load_config(file=own, base=PRESETS[_preset(stores, device)[0]]), of_the_run
    name, why = _preset(stores, device)
    return PRESETS[name], f"preset {name}, since {why}; --preset takes another one"


def _preset(stores: Sequence[StorePlace], device: torch.device) -> tuple[str, str]:
    if device.type == "cpu":
        return "tiny", "training is on a CPU"
    opened = [Store.open(path) for path in stores]
    edge = min(store.superpatch for store in opened)
    if any(store.superpatch < max(PRESETS["base"].model.crop_zyx) for store in opened):
        return "tiny", f"the superpatches of the store have an edge of {edge} voxels"
    volumes = sum(len(store.volumes()) for store in opened)
    name = "base" if volumes >= _MANY_VOLUMES else "small"
    return name, f"training is on a GPU and the stores hold {counted(volumes, 'volume')} (base from {_MANY_VOLUMES} on)"
