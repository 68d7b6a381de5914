"""The encoder by itself gives what the model's own encoder gives with nothing hidden, for every kind of model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.runs import SMALL

from maesil.config.schema import MODEL_KINDS, MaskConfig
from maesil.models.encoders import encoder_of, untrained_encoder
from maesil.models.masked_autoencoder import sincos_positions
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.models.patches import patchify
from maesil.models.registry import make_model
from maesil.types import Intensity

INTENSITY = Intensity((-900.0, 700.0), 0.4, 0.3)
pytestmark = pytest.mark.usefixtures("one_thread")


def a_volume(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1200, 1500, shape, dtype=torch.int16, generator=torch.Generator().manual_seed(seed))


def a_model(kind: str):
    model = make_model(replace(SMALL, kind=kind, channels=4, latent=10, codes=4))
    model.init_weights(torch.Generator().manual_seed(1))
    return model.eval()


def everything_visible(volume: torch.Tensor) -> MaskedInput:
    masks = make_masks(MaskConfig(kind="none"), SMALL.grid, [0] * len(volume))
    return MaskedInput(volume, masks, INTENSITY, SMALL.patch)


@torch.no_grad()
def test_a_transformer_gives_the_latent_of_its_model():
    model, volume = a_model("maesil"), a_volume(2, 32, 32, 32)
    inputs = everything_visible(volume)
    latent = model.forward_encoder(inputs.visible_patches(torch.float32), inputs.masks.ids_keep)
    torch.testing.assert_close(encoder_of(model, INTENSITY).forward_features(volume), latent, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ae", "vae", "vqvae"])
def test_convolutions_give_the_code_of_their_model(kind):
    model, volume = a_model(kind), a_volume(2, 32, 32, 32)
    code = model.encoder(model._masked_volume(everything_visible(volume)))
    code = code[:, :10]  # of a VAE: the mean, without the variance
    tokens = encoder_of(model, INTENSITY).forward_features(volume)
    torch.testing.assert_close(tokens, code.flatten(2).transpose(1, 2), rtol=0, atol=0)


@torch.no_grad()
def test_a_token_of_slices_is_their_mean():
    model, volume = a_model("mae2d"), a_volume(1, 32, 32, 32)
    values = ((volume.float().clamp(-900, 700) + 900) / 1600 - 0.4) / 0.3
    tokens = encoder_of(model, INTENSITY).forward_features(volume)[0]
    for layer in range(4):
        encoded = []
        for image in values[0, 8 * layer : 8 * layer + 8]:
            patches = image.reshape(4, 8, 4, 8).transpose(1, 2).reshape(1, 16, 64)
            here = model.patch_embed(patches) + model.pos_embed
            for block in model.blocks:
                here = block(here)
            encoded.append(model.norm(here)[0])
        torch.testing.assert_close(
            tokens[16 * layer : 16 * layer + 16], torch.stack(encoded).mean(0), rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_tokens_stand_where_their_patches_do_on_any_grid(kind):
    encoder = encoder_of(a_model(kind), INTENSITY)
    volume = a_volume(1, 24, 32, 40)
    tokens = encoder.forward_features(volume)
    assert tokens.shape == (1, 3 * 4 * 5, encoder.width)
    values = ((volume.float().clamp(-900, 700) + 900) / 1600 - 0.4) / 0.3
    torch.testing.assert_close(encoder.patches(volume), patchify(values, 8))
    if kind == "maesil":
        assert torch.equal(encoder._positions((3, 4, 5)), sincos_positions((3, 4, 5), encoder.width))


@torch.no_grad()
def test_values_beyond_the_window_change_nothing():
    encoder, volume = encoder_of(a_model("maesil"), INTENSITY), a_volume(1, 32, 32, 32)
    torch.testing.assert_close(encoder(volume), encoder(volume.clamp(-900, 700)), rtol=0, atol=0)


@pytest.mark.parametrize("shape, dtype", [
    ((1, 32, 32, 32), torch.float32), ((1, 32, 32, 30), torch.int16), ((32, 32, 32), torch.int16),
    ((1, 32, 32, 0), torch.int16), ((0, 32, 32, 32), torch.int16),
])  # fmt: skip
def test_other_input_is_refused_with_what_was_expected(shape, dtype):
    with pytest.raises(ValueError, match="expected int16 HU"):
        encoder_of(a_model("maesil"), INTENSITY).forward_features(torch.zeros(shape, dtype=dtype))


def test_an_untrained_encoder_is_drawn_as_training_begins():
    config = replace(SMALL, depth=2)
    model = make_model(config)
    model.init_weights(torch.Generator().manual_seed(5))
    drawn, other = (untrained_encoder(config, INTENSITY, seed) for seed in (5, 6))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in drawn.named_parameters())
    assert not torch.equal(drawn.patch_embed.weight, other.patch_embed.weight)
