"""The models by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from maesil.config.schema import ModelConfig
from maesil.models.autoencoders import Autoencoder, VariationalAutoencoder, VectorQuantisedAutoencoder
from maesil.models.masked_autoencoder import MaskedAutoencoder, ReconstructionModel
from maesil.models.primus import PrimusAutoencoder
from maesil.models.slice_mae import SliceMaskedAutoencoder

_KINDS: dict[str, Callable[[ModelConfig], ReconstructionModel]] = {
    "maesil": MaskedAutoencoder,
    "primus": PrimusAutoencoder,
    "mae2d": SliceMaskedAutoencoder,
    "ae": Autoencoder,
    "vae": VariationalAutoencoder,
    "vqvae": VectorQuantisedAutoencoder,
}


def make_model(config: ModelConfig) -> ReconstructionModel:
    """Make the model of a configuration; its weights are drawn by `ReconstructionModel.init_weights`."""
    return _KINDS[config.kind](config)
