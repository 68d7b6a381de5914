from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from maesil import kernels
from maesil.config import PRESETS, MaskConfig, ModelConfig
from maesil.masking import make_masks
from maesil.model import MaskedAutoencoder, patchify, sincos_positions, to_hu, unpatchify
from maesil.types import Intensity

SMALL = ModelConfig(crop=32, width=24, depth=2, decoder_width=16, decoder_depth=1)
INTENSITY = Intensity(window=(-500.0, 700.0), mean=0.4, std=0.3)


@pytest.fixture
def model():
    model = MaskedAutoencoder(SMALL)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def volume():
    return torch.randint(-1024, 1500, (2, 32, 32, 32), generator=torch.Generator().manual_seed(1)).short()


@pytest.fixture
def masks():
    return make_masks(MaskConfig(), SMALL.grid, [3, 4])


def test_forward_predicts_the_hidden_tokens_that_predict_all_predicts(model, volume, masks):
    hidden = model(volume, masks, INTENSITY)
    everything = model.predict_all(volume, masks, INTENSITY)
    assert hidden.shape == (2, masks.ids_masked.shape[1], 512)
    assert everything.shape == (2, 64, 512)
    for b in range(2):
        torch.testing.assert_close(hidden[b], everything[b, masks.ids_masked[b]])


def test_predictions_do_not_depend_on_hidden_voxels_but_on_every_visible_patch(model, volume, masks):
    base = model(volume, masks, INTENSITY)
    hidden = unpatchify(masks.mask[..., None].expand(-1, -1, 512), SMALL.grid, 8) > 0
    other = torch.where(hidden, torch.zeros((), dtype=torch.int16), volume)
    assert torch.equal(model(other, masks, INTENSITY), base)
    for token in masks.ids_keep[0]:
        patches = patchify(volume, 8).clone()
        patches[0, token] = patches[0, token].flip(0)
        changed = model(unpatchify(patches, SMALL.grid, 8), masks, INTENSITY)
        assert not torch.allclose(changed[0], base[0], atol=1e-6)
        assert torch.equal(changed[1], base[1])


def test_flip_equals_a_mirrored_volume(model, volume, masks):
    flip = torch.tensor([[True, False, True], [False, True, False]])
    mirrored = torch.stack([volume[0].flip(0, 2), volume[1].flip(1)])
    weight = torch.rand(masks.ids_masked.shape)
    by_kernel = model(volume, masks, INTENSITY, flip)
    torch.testing.assert_close(by_kernel, model(mirrored, masks, INTENSITY))
    torch.testing.assert_close(
        model.forward_loss(by_kernel, volume, masks, INTENSITY, weight, flip),
        model.forward_loss(by_kernel, mirrored, masks, INTENSITY, weight),
    )


def test_loss_compares_with_the_true_patches(model, volume, masks):
    pred = torch.zeros(2, masks.ids_masked.shape[1], 512)
    value = ((volume.float().clamp(-500, 700) + 500) / 1200 - 0.4) / 0.3
    truth = patchify(value, 8).gather(1, masks.ids_masked[..., None].expand(-1, -1, 512))
    loss = model.forward_loss(pred, volume, masks, INTENSITY)
    torch.testing.assert_close(loss, truth.square().mean())


def test_a_step_reaches_every_parameter(model, volume, masks):
    loss = model.forward_loss(model(volume, masks, INTENSITY), volume, masks, INTENSITY)
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert math.isfinite(loss.item())


def test_patchify_uses_the_token_order_of_the_kernels(volume):
    ids = torch.arange(64).expand(2, -1)
    raw = {"window": (-2000.0, 2000.0), "mean": 0.0, "std": 1.0, "dtype": torch.float64}
    gathered = kernels.gather_patches(volume, ids, patch_size=8, **raw)
    torch.testing.assert_close(patchify(volume, 8).double(), gathered * 4000 - 2000)
    uneven = torch.arange(2 * 8 * 16 * 24).reshape(2, 8, 16, 24)
    assert torch.equal(unpatchify(patchify(uneven, 8), (1, 2, 3), 8), uneven)


@pytest.mark.parametrize("width", [192, 128, 8])
def test_positions_are_distinct_sines_and_cosines_padded_with_zeros(width):
    grid = (3, 4, 5)
    codes = sincos_positions(grid, width).double().numpy()
    frequencies = width // 6
    for token, (z, y, x) in enumerate(np.ndindex(*grid)):
        angles = [p * 10.0 ** (-i / frequencies) for p in (z, y, x) for i in range(frequencies)]
        a = np.array(angles).reshape(3, frequencies)
        expected = np.concatenate([np.sin(a), np.cos(a)], axis=1).ravel()
        np.testing.assert_allclose(codes[token, : 6 * frequencies], expected, atol=1e-6)
    assert (codes[:, 6 * frequencies :] == 0).all()
    assert len(np.unique(codes.round(6), axis=0)) == 60


def test_to_hu_undoes_the_normalisation_and_clips(volume):
    value = ((volume.float().clamp(-500, 700) + 500) / 1200 - 0.4) / 0.3
    torch.testing.assert_close(to_hu(value, INTENSITY), volume.float().clamp(-500, 700), atol=1e-3, rtol=0)
    assert to_hu(torch.tensor([-99.0, 99.0]), INTENSITY).tolist() == [-500.0, 700.0]


def test_equal_seeds_give_equal_weights_and_positions_stay_out_of_the_checkpoint(model):
    again = MaskedAutoencoder(SMALL)
    again.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not [name for name in model.state_dict() if "pos_embed" in name]


def test_names_are_those_of_mae():
    top = {name.split(".")[0] for name in MaskedAutoencoder(SMALL).state_dict()}
    encoder = {"patch_embed", "blocks", "norm"}
    assert top == encoder | {"decoder_embed", "mask_token", "decoder_blocks", "decoder_norm", "decoder_pred"}


def test_the_encoder_of_base_is_a_vit_b():
    with torch.device("meta"):
        blocks = MaskedAutoencoder(PRESETS["base"].model).blocks
    assert sum(parameter.numel() for parameter in blocks.parameters()) == 12 * (12 * 768**2 + 13 * 768)


def test_bfloat16_autocast_stays_close_to_float32(model, volume, masks):
    exact = model(volume, masks, INTENSITY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(volume, masks, INTENSITY)
    assert low.dtype is torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.1 * exact.abs().max()
    loss = model.forward_loss(low, volume, masks, INTENSITY)
    assert loss.dtype is torch.float32
