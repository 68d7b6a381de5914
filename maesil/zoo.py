"""The models by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from maesil.baselines import Autoencoder, VariationalAutoencoder, VectorQuantisedAutoencoder
from maesil.config import ModelConfig
from maesil.mae2d import SliceMaskedAutoencoder
from maesil.model import MaskedAutoencoder, ReconstructionModel

_KINDS: dict[str, Callable[[ModelConfig], ReconstructionModel]] = {
    "maesil": MaskedAutoencoder,
    "mae2d": SliceMaskedAutoencoder,
    "ae": Autoencoder,
    "vae": VariationalAutoencoder,
    "vqvae": VectorQuantisedAutoencoder,
}


def make_model(config: ModelConfig) -> ReconstructionModel:
    """Make the model of a configuration; its weights are drawn by `ReconstructionModel.init_weights`."""
    return _KINDS[config.kind](config)
