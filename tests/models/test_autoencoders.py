"""All models that are compared: the same contract, and what is special to each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.lanes import slow_but

from maesil.config.schema import MaskConfig, ModelConfig
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import draw_noise, make_masks
from maesil.models.patches import patchify, tokens_at, unpatchify
from maesil.models.registry import make_model
from maesil.types import Intensity

CONFIG = ModelConfig(
    crop=32, width=24, depth=1, decoder_width=16, decoder_depth=1, channels=4, latent=6, codes=12, penalty=0.5
)
INTENSITY = Intensity(window=(-500.0, 700.0), mean=0.4, std=0.3)
KINDS = ["maesil", "primus", "mae2d", "ae", "vae", "vqvae"]


def made(kind, **changes):
    torch.manual_seed(0)
    model = make_model(replace(CONFIG, kind=kind, **changes))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def volume():
    return torch.randint(-1024, 1500, (2, 32, 32, 32), generator=torch.Generator().manual_seed(1)).short()


def given(volume, kind="dual"):
    return MaskedInput(volume, make_masks(MaskConfig(kind=kind), CONFIG.grid, [3, 4]), INTENSITY, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["dual", "none"])
def test_every_model_predicts_the_targets_of_what_it_is_given(volume, kind, mask):
    inputs, model = given(volume, mask), made(kind).eval()
    prediction = model(inputs)
    assert prediction.patches_BSV.shape == (2, inputs.targets.shape[1], 512)
    torch.testing.assert_close(prediction.shown, tokens_at(model.predict_all(inputs), inputs.targets))


@pytest.mark.parametrize("kind", KINDS)
def test_no_model_sees_hidden_voxels_and_every_one_sees_the_others(volume, kind):
    inputs, model = given(volume), made(kind)
    model(inputs)  # a codebook starts with the first batch
    base = model.eval()(inputs).patches_BSV
    mask = inputs.masks.mask[..., None].expand(-1, -1, 512)
    hidden = unpatchify(mask, CONFIG.grid, 8) > 0
    noise = torch.randint(-1024, 1500, volume.shape, generator=torch.Generator().manual_seed(2)).short()
    assert torch.equal(model(replace(inputs, crops=torch.where(hidden, noise, volume))).patches_BSV, base)
    changed = model(replace(inputs, crops=torch.where(hidden, volume, noise))).patches_BSV
    assert not torch.allclose(changed, base, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(volume, kind):
    inputs, model = given(volume), made(kind)
    prediction = model(inputs)
    loss = inputs.loss(prediction.patches_BSV)
    if prediction.auxiliary_loss is not None:
        loss = loss + model.auxiliary_weight(1.0) * prediction.auxiliary_loss
    if prediction.pictured_BSV is not None:
        loss = loss + inputs.loss(prediction.pictured_BSV)
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("kind", slow_but(KINDS, ("maesil", "mae2d")))
def test_every_model_can_learn_one_crop(kind):
    z, y, x = torch.meshgrid(*(torch.linspace(-1, 1, 32),) * 3, indexing="ij")
    volume = (600 * torch.sin(3 * x + 2 * y) * torch.cos(2 * z)).short()[None]
    masks = make_masks(MaskConfig(kind="none"), CONFIG.grid, [0])
    inputs, model = MaskedInput(volume, masks, INTENSITY, 8), made(kind, latent=32, channels=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        prediction = model(inputs)
        loss = inputs.loss(prediction.patches_BSV)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.35 * losses[0]


def test_a_slice_of_the_2d_model_depends_on_its_own_slice_alone(volume):
    inputs, model = given(volume, "none"), made("mae2d")
    base = unpatchify(model(inputs).patches_BSV, CONFIG.grid, 8)
    other = volume.clone()
    other[:, 13] = other[:, 13].flip(-1)
    changed = unpatchify(model(replace(inputs, crops=other)).patches_BSV, CONFIG.grid, 8)
    differs = (changed - base).abs().amax(dim=(0, 2, 3)) > 1e-4
    assert differs.nonzero().flatten().tolist() == [13]


def test_the_vae_draws_with_the_noise_it_is_given_and_warms_its_auxiliary_loss_up(volume):
    inputs, model = given(volume), made("vae")
    noise = draw_noise(model.noise_shape, [5, 6])
    assert torch.equal(noise[1:], draw_noise(model.noise_shape, [6]))  # of its sample's seed, whoever it is drawn with
    drawn = model(replace(inputs, noise=noise)).patches_BSV
    assert not torch.allclose(drawn, model(inputs).patches_BSV)
    assert torch.equal(drawn, model(replace(inputs, noise=noise)).patches_BSV)
    weights = [model.auxiliary_weight(progress) for progress in (0.0, 0.15, 0.3, 1.0)]
    assert weights == pytest.approx([0.0, 0.25, 0.5, 0.5])


@torch.no_grad()
def test_the_2d_model_is_a_masked_autoencoder_of_each_slice_under_the_mask_of_its_layer(volume):
    inputs, model = given(volume), made("mae2d").eval()
    found = unpatchify(model.predict_all(inputs), CONFIG.grid, 8)
    values = ((volume.float().clamp(-500, 700) + 500) / 1200 - 0.4) / 0.3
    for crop, z in ((0, 3), (0, 17), (1, 13), (1, 31)):
        patches = values[crop, z].reshape(4, 8, 4, 8).transpose(1, 2).reshape(16, 64)
        seen = inputs.masks.mask.view(2, 4, 16)[crop, z // 8] == 0
        tokens = model.patch_embed(patches[seen])[None] + model.pos_embed[seen]
        for block in model.blocks:
            tokens = block(tokens)
        decoded = model.mask_token.expand(1, 16, -1).clone()
        decoded[:, seen] = model.decoder_embed(model.norm(tokens))
        decoded = decoded + model.decoder_pos_embed
        for block in model.decoder_blocks:
            decoded = block(decoded)
        expected = model.pred(model.decoder_norm(decoded)).reshape(4, 4, 8, 8).transpose(1, 2).reshape(32, 32)
        torch.testing.assert_close(found[crop, z], expected, atol=1e-5, rtol=1e-5)


def test_a_drawn_code_is_that_of_torch():
    """Mean plus noise times the standard deviation, not the variance."""
    code, noise = torch.randn(2, 12, 4, 4, 4), torch.randn(2, 6, 4, 4, 4)
    mean, log_variance = code.chunk(2, dim=1)
    normal = torch.distributions.Normal(mean, log_variance.exp().sqrt())
    drawn = made("vae").bottleneck(code, noise)[0]
    torch.testing.assert_close(normal.cdf(drawn), torch.distributions.Normal(0.0, 1.0).cdf(noise))


def test_the_kl_is_that_of_torch(volume):
    model = made("vae")
    code = torch.randn(2, 12, 4, 4, 4)
    mean, log_variance = code.chunk(2, dim=1)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(model.bottleneck(code)[1], expected)


def test_codes_are_the_nearest_and_the_gradient_passes_straight_through():
    model = made("vqvae").eval()
    model.codebook_Kc.copy_(torch.randn(12, 6, generator=torch.Generator().manual_seed(3)))
    code = torch.randn(1, 6, 2, 2, 2, requires_grad=True)
    quantised, commitment, facts = model.bottleneck(code)
    flat = code.detach().movedim(1, -1).reshape(-1, 6)
    distances = (flat[:, None] - model.codebook_Kc).square().sum(-1)
    torch.testing.assert_close(quantised.movedim(1, -1).reshape(-1, 6), model.codebook_Kc[distances.argmin(1)])
    torch.testing.assert_close(commitment, distances.min(1).values.mean() / 6)
    weight = torch.randn(quantised.shape)
    (quantised * weight).sum().backward(retain_graph=True)
    assert torch.equal(code.grad, weight)
    code.grad = None
    commitment.backward()  # pulls the code towards what was chosen
    chosen = quantised.detach()
    torch.testing.assert_close(code.grad, 2 * (code.detach() - chosen) / code.numel())
    assert 1 <= facts["perplexity"] <= 8


def test_the_codebook_starts_from_the_data_and_dead_codes_are_revived():
    model = made("vqvae").train()
    generator = torch.Generator().manual_seed(0)

    def perplexity():
        code = 5 * torch.randn(4, 6, 4, 4, 4, generator=generator)
        return float(model.bottleneck(code)[2]["perplexity"])

    assert perplexity() > 6
    model.codebook_Kc[1:] = 1000.0  # nothing is near them any more
    model.sums_Kc.copy_(model.codebook_Kc * model.counts_K[:, None])
    assert perplexity() == pytest.approx(1.0)
    for _ in range(400):
        recovered = perplexity()
    assert recovered > 6


def test_the_codebook_follows_in_training_and_stands_still_while_it_is_scored():
    model, code = made("vqvae"), torch.randn(4, 6, 4, 4, 4)
    for mode, stands in ((True, False), (False, True), (True, False)):
        before = {name: value.clone() for name, value in model.named_buffers()}
        model.train(mode).bottleneck(code + torch.randn(6, 1, 1, 1))
        for name in ("codebook_Kc", "counts_K", "sums_Kc"):
            assert torch.equal(getattr(model, name), before[name]) == stands


def test_the_codebook_is_the_average_of_what_chose_it():
    """Two far clusters, two codes: each becomes the mean of its own, weighted by what came when."""
    model = made("vqvae", codes=2).train()
    model.codebook_Kc.copy_(torch.tensor([[-9.0], [9.0]]).expand(2, 6))
    model.counts_K.fill_(32.0)
    model.sums_Kc.copy_(32 * model.codebook_Kc)
    code = torch.cat([torch.full((1, 6, 2, 4, 4), -10.0), torch.full((1, 6, 2, 4, 4), 8.0)], dim=2)
    model.bottleneck(code)
    expected = torch.tensor([[0.95 * -9 + 0.05 * -10], [0.95 * 9 + 0.05 * 8]]).expand(2, 6)
    torch.testing.assert_close(model.codebook_Kc, expected)


def test_latent_sizes_are_stated():
    values = {kind: made(kind).latent_per_voxel for kind in KINDS}
    assert values == pytest.approx(
        {"maesil": 24 / 512, "primus": 24 / 512, "mae2d": 24 / 64, "ae": 6 / 512, "vae": 6 / 512, "vqvae": 1 / 512}
    )


def test_convolutions_get_the_mask_as_a_channel(volume):
    inputs, model = given(volume), made("ae")
    seen, hidden = model._masked_volume(inputs).unbind(1)
    assert torch.equal(patchify(hidden, 8), inputs.masks.mask[..., None].expand(-1, -1, 512))
    assert (seen[hidden > 0] == 0).all()
    value = ((volume.float().clamp(-500, 700) + 500) / 1200 - 0.4) / 0.3
    torch.testing.assert_close(seen[hidden == 0], value[hidden == 0])
