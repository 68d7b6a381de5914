from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from maesil import kernels
from maesil.config.presets import PRESETS
from maesil.config.schema import MaskConfig, ModelConfig
from maesil.models.masked_autoencoder import Block, CrossBlock, MaskedAutoencoder, sincos_positions
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import Masks, draw_targets, make_masks
from maesil.models.patches import patchify, to_hu, tokens_at, unpatchify
from maesil.types import Intensity

SMALL = ModelConfig(crop=32, width=24, depth=2, decoder_width=16, decoder_depth=1)
DECODERS = [
    ("full", "linear"), ("full", "overlap"), ("full", "interpolate"), ("full", "refine"),
    ("subset", "linear"), ("subset", "refine"), ("cross", "linear"), ("cross", "refine"),
]  # fmt: skip
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


@pytest.fixture
def inputs(volume, masks):
    return MaskedInput(volume, masks, INTENSITY, 8)


def made(**changes):
    model = MaskedAutoencoder(replace(SMALL, **changes))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(("decoder", "head"), DECODERS)
def test_forward_predicts_the_hidden_tokens_that_predict_all_predicts(inputs, decoder, head):
    model = made(decoder=decoder, head=head)
    hidden, everything = model(inputs).shown, model.predict_all(inputs)
    assert hidden.shape == (2, inputs.masks.ids_masked.shape[1], 512)
    assert everything.shape == (2, 64, 512)
    torch.testing.assert_close(hidden, tokens_at(everything, inputs.masks.ids_masked), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("decoder", "head"), DECODERS)
def test_predictions_do_not_depend_on_hidden_voxels_but_on_every_visible_patch(volume, masks, decoder, head):
    model = made(decoder=decoder, head=head)
    base = model(MaskedInput(volume, masks, INTENSITY, 8)).patches_BSV
    hidden = unpatchify(masks.mask[..., None].expand(-1, -1, 512), SMALL.grid, 8) > 0
    other = torch.where(hidden, torch.zeros((), dtype=torch.int16), volume)
    assert torch.equal(model(MaskedInput(other, masks, INTENSITY, 8)).patches_BSV, base)
    for token in masks.ids_keep[0, ::5]:
        patches = patchify(volume, 8).clone()
        patches[0, token] = patches[0, token].flip(0)
        changed = model(MaskedInput(unpatchify(patches, SMALL.grid, 8), masks, INTENSITY, 8)).patches_BSV
        assert not torch.allclose(changed[0], base[0], atol=1e-6)
        torch.testing.assert_close(changed[1], base[1])


def test_a_lean_cross_decoder_predicts_a_token_the_same_whichever_others_it_predicts(inputs):
    """Its tokens never look at each other; the head is linear, so neither does it."""
    model = made(decoder="cross", head="linear")
    some = draw_targets(inputs.masks, 0.25, [1, 2])
    assert some.shape == (2, 12) and (some.diff(dim=1) > 0).all()
    lean = model(replace(inputs, ids_target=some)).patches_BSV
    torch.testing.assert_close(lean, tokens_at(model.predict_all(inputs, pictured=False), some), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("decoder", "head"), DECODERS)
def test_what_is_predicted_follows_the_order_of_what_is_asked_for(inputs, decoder, head):
    model, some = made(decoder=decoder, head=head), draw_targets(inputs.masks, 0.25, [1, 2])
    order = torch.randperm(some.shape[1])
    forward, other = (model(replace(inputs, ids_target=ids)).shown for ids in (some, some[:, order]))
    torch.testing.assert_close(other, forward[:, order], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(other, forward, atol=1e-3)


def test_a_token_is_encoded_with_the_position_of_its_patch(model):
    """Whoever hands patches over in another order gets the same tokens in that order."""
    patches, ids = torch.randn(2, 20, 512), torch.stack([torch.randperm(64)[:20] for _ in range(2)])
    order = torch.randperm(20)
    tokens = model.forward_encoder(patches, ids)
    torch.testing.assert_close(model.forward_encoder(patches[:, order], ids[:, order]), tokens[:, order])
    assert not torch.allclose(model.forward_encoder(patches, ids[:, order]), tokens, atol=1e-2)


@torch.no_grad()
def test_the_model_is_a_masked_autoencoder_written_out(inputs, volume, masks):
    model = made(head="linear", picture_head="none")
    found = model.predict_all(inputs)
    patches = patchify(((volume.float().clamp(-500, 700) + 500) / 1200 - 0.4) / 0.3, 8)
    for crop in range(2):
        seen = masks.mask[crop] == 0
        tokens = model.patch_embed(patches[crop, seen])[None] + sincos_positions(SMALL.grid, 24)[seen]
        for block in model.blocks:
            tokens = block(tokens)
        decoded = model.mask_token.expand(1, 64, -1).clone()
        decoded[:, seen] = model.decoder_embed(model.norm(tokens))
        decoded = decoded + sincos_positions(SMALL.grid, 16)
        for block in model.decoder_blocks:
            decoded = block(decoded)
        expected = model.head.pred(model.decoder_norm(decoded))[0]
        torch.testing.assert_close(found[crop], expected, atol=1e-5, rtol=1e-5)


def test_a_block_is_that_of_torch():
    ours, tokens = Block(24, 3), torch.randn(2, 10, 24)
    theirs = torch.nn.TransformerEncoderLayer(
        24, 3, 96, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6
    )
    state = dict(zip(theirs.state_dict(), [
        ours.attn.qkv.weight, ours.attn.qkv.bias, ours.attn.proj.weight, ours.attn.proj.bias,
        ours.mlp[0].weight, ours.mlp[0].bias, ours.mlp[2].weight, ours.mlp[2].bias,
        ours.norm1.weight, ours.norm1.bias, ours.norm2.weight, ours.norm2.bias,
    ], strict=True))  # fmt: skip
    theirs.load_state_dict(state)
    torch.testing.assert_close(ours(tokens), theirs(tokens), atol=1e-5, rtol=1e-5)


def test_a_cross_block_attends_to_the_memory_alone_as_torch_does():
    ours, tokens, memory = CrossBlock(24, 3), torch.randn(2, 10, 24), torch.randn(2, 7, 24)
    theirs, attn = torch.nn.MultiheadAttention(24, 3, batch_first=True), ours.attn
    weights, biases = (torch.cat([getattr(one, name) for one in (attn.q, attn.kv)]) for name in ("weight", "bias"))
    theirs.load_state_dict({
        "in_proj_weight": weights, "in_proj_bias": biases,
        "out_proj.weight": attn.proj.weight, "out_proj.bias": attn.proj.bias,
    })  # fmt: skip
    seen = ours.norm_memory(memory)
    mixed = tokens + theirs(ours.norm1(tokens), seen, seen, need_weights=False)[0]
    torch.testing.assert_close(ours(tokens, memory), mixed + ours.mlp(ours.norm2(mixed)), atol=1e-5, rtol=1e-5)


def test_without_a_mask_the_pictures_are_not_filled_from_the_truth(volume):
    """With an encoder that says nothing, nothing of the voxels comes out."""
    masks, model = make_masks(MaskConfig(kind="none"), SMALL.grid, [0, 1]), made()
    torch.nn.init.zeros_(model.patch_embed.weight)
    for parameter in model.picture_head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    one, other = (model(MaskedInput(some, masks, INTENSITY, 8)).shown for some in (volume, volume.flip(0, 2)))
    assert torch.equal(one, other)


def test_the_loss_on_the_latent_reaches_the_encoder(inputs):
    model = made(decorrelation=0.1)
    model(inputs).auxiliary_loss.backward()
    reached = {name.split(".")[0] for name, one in model.named_parameters() if one.grad is not None}
    assert reached == {"patch_embed", "blocks", "norm"}
    assert model.auxiliary_weight(0.5) == 0.1
    assert model.eval()(inputs).auxiliary_loss is None


@pytest.mark.parametrize("decoder", ["subset", "cross"])
def test_a_lean_decoder_decodes_fewer_tokens(inputs, decoder):
    model, seen = made(decoder=decoder), []
    model.decoder_blocks[0].register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    model(replace(inputs, ids_target=draw_targets(inputs.masks, 0.25, [1, 2])))
    assert seen == [{"subset": 16 + 12, "cross": 12}[decoder]]


@pytest.mark.parametrize(("decoder", "head"), DECODERS)
def test_flip_equals_a_mirrored_volume(volume, masks, decoder, head):
    model = made(decoder=decoder, head=head)
    flip = torch.tensor([[True, False, True], [False, True, False]])
    mirrored = torch.stack([volume[0].flip(0, 2), volume[1].flip(1)])
    weight = torch.rand(masks.ids_masked.shape)
    by_kernel = MaskedInput(volume, masks, INTENSITY, 8, flip_B3=flip)
    by_hand = MaskedInput(mirrored, masks, INTENSITY, 8)
    pred = model(by_kernel).patches_BSV
    torch.testing.assert_close(pred, model(by_hand).patches_BSV)
    torch.testing.assert_close(by_kernel.loss(pred, weight), by_hand.loss(pred, weight))


def test_each_sample_may_have_its_own_window(model, volume, masks):
    windows = torch.tensor([[-400.0, 600.0], [-900.0, 300.0]])
    together = MaskedInput(volume, masks, INTENSITY, 8, window_B2=windows)
    pred = model(together).patches_BSV
    for b in range(2):
        alone = MaskedInput(
            volume[b : b + 1], Masks(*(ids[b : b + 1] for ids in vars(masks).values())),
            replace(INTENSITY, window=tuple(windows[b].tolist())), 8,
        )  # fmt: skip
        torch.testing.assert_close(model(alone).patches_BSV[0], pred[b], atol=1e-5, rtol=1e-5)
        only_this = torch.zeros(masks.ids_masked.shape)
        only_this[b] = 1.0
        torch.testing.assert_close(together.loss(pred, only_this), alone.loss(pred[b : b + 1]))


def test_loss_compares_with_the_true_patches(inputs, volume, masks):
    pred = torch.zeros(2, masks.ids_masked.shape[1], 512)
    value = ((volume.float().clamp(-500, 700) + 500) / 1200 - 0.4) / 0.3
    torch.testing.assert_close(inputs.loss(pred), tokens_at(patchify(value, 8), masks.ids_masked).square().mean())


@pytest.mark.parametrize(("decoder", "head"), DECODERS)
def test_a_step_reaches_every_parameter(inputs, decoder, head):
    model = made(decoder=decoder, head=head)
    prediction = model(inputs)
    loss = inputs.loss(prediction.patches_BSV) + inputs.loss(prediction.pictured_BSV)
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert math.isfinite(loss.item())


def test_without_a_mask_everything_is_seen_and_predicted_and_nothing_is_copied(volume):
    """Were a true patch copied into its own prediction, changing the weights would not change the error to 0."""
    masks = make_masks(MaskConfig(kind="none"), SMALL.grid, [0, 1])
    inputs, model = MaskedInput(volume, masks, INTENSITY, 8), made()
    pred = model(inputs).shown
    assert pred.shape == (2, 64, 512)
    torch.testing.assert_close(pred, model.predict_all(inputs))
    assert inputs.loss(pred) > 0.1


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
    assert top == encoder | {"decoder_embed", "mask_token", "decoder_blocks", "decoder_norm", "head", "picture_head"}


def test_the_encoder_of_base_is_a_vit_b():
    with torch.device("meta"):
        blocks = MaskedAutoencoder(PRESETS["base"].model).blocks
    assert sum(parameter.numel() for parameter in blocks.parameters()) == 12 * (12 * 768**2 + 13 * 768)


def test_bfloat16_autocast_stays_close_to_float32(model, inputs):
    exact = model(inputs).patches_BSV
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(inputs).patches_BSV
    assert low.dtype is torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert inputs.loss(low).dtype is torch.float32
