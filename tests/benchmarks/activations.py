"""Memory that one crop of a preset keeps for the way back, with and without activation checkpointing, on a CPU.

    python tests/benchmarks/activations.py tiny small base

Run it from the repository's root with ``tests`` on PYTHONPATH. A row is one preset: MB kept without, MB kept with,
seconds of forward and backward without and with. Nothing is trained and no store is read.
"""

from __future__ import annotations

import sys
import time

import torch
from support.activations import kept_bytes

from maesil.config.presets import PRESETS
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.models.registry import make_model
from maesil.types import Intensity


def main(names: list[str]) -> None:
    """Print the table."""
    for name in names:
        preset = PRESETS[name]
        model = make_model(preset.model)
        model.init_weights(torch.Generator().manual_seed(0))
        crop = preset.model.crop_zyx
        volume = torch.randint(-1024, 1500, (1, *crop), generator=torch.Generator().manual_seed(1)).short()
        masks = make_masks(preset.mask, preset.model.grid, [0])
        inputs = MaskedInput(volume, masks, Intensity((-1000.0, 1000.0), 0.4, 0.3), preset.model.patch, pictured=None)
        row = []
        for model.activation_checkpointing in (False, True):
            started = time.perf_counter()
            owned = [*model.parameters(), *model.buffers(), volume]
            loss, kept = kept_bytes(lambda: inputs.loss(model(inputs).patches_BSV), owned)  # noqa: B023
            loss.backward()
            row.append((kept / 1e6, time.perf_counter() - started))
        (before, slow), (after, slower) = row
        print(f"{name:8} {before:10.0f} MB {after:10.0f} MB {slow:8.1f} s {slower:8.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:] or ["tiny", "small"])
