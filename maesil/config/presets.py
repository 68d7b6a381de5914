"""The presets: configurations with a name, from `tiny` for a CPU to `large`."""

from __future__ import annotations

from dataclasses import replace

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig


def _primus(like: RunConfig, width: int, depth: int) -> RunConfig:
    """Return a configuration of which the encoder is a Primus of this size."""
    return replace(like, model=replace(like.model, kind="primus", width=width, depth=depth))


_CROSS = ModelConfig(decoder="cross", decoded=0.5)
"""Half of the hidden tokens look at the visible ones, and at nothing else: all they learn comes through the latent."""

PRESETS: dict[str, RunConfig] = {
    "tiny": RunConfig(_CROSS),
    "small": RunConfig(
        replace(_CROSS, crop=128, width=384, depth=12, decoder_width=256, decoder_depth=2),
        train=TrainConfig(steps=50_000, batch=16, lr=2e-3, ema=0.999, log_every=10, validate_every=1000,
                          checkpoint_every=1000, picture_every=5000, readers=4),
    ),
    "base": RunConfig(
        replace(_CROSS, crop=128, width=768, depth=12, decoder_width=384, decoder_depth=4),
        train=TrainConfig(steps=100_000, batch=16, lr=1e-3, ema=0.999, log_every=10, validate_every=1000,
                          checkpoint_every=1000, picture_every=5000, readers=4),
    ),
    "large": RunConfig(
        replace(_CROSS, crop=128, width=1024, depth=24, decoder_width=512, decoder_depth=4),
        train=TrainConfig(steps=200_000, batch=16, lr=7e-4, ema=0.999, log_every=10, validate_every=1000,
                          checkpoint_every=1000, picture_every=5000, readers=4),
    ),
}  # fmt: skip
PRESETS |= {
    f"primus-{size}": _primus(PRESETS[like], width, depth)
    for size, like, width, depth in (
        ("s", "small", 396, 12), ("b", "base", 792, 12), ("m", "base", 864, 16), ("l", "large", 1056, 24),
    )
}  # fmt: skip
"""Model sizes (those of ViT-Ti, S, B, L with a light decoder, ours; those of Primus S, B, M, L) with budgets that suit
them."""
