"""The encoder of Primus is the library's: same weights, same tokens; and it is trained by what all models share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.other_side import run_there, with_nnunet
from support.runs import SMALL

from maesil.config.presets import PRESETS
from maesil.config.schema import MaskConfig, ModelConfig
from maesil.downstream.primus import primus_state
from maesil.errors import UsageError
from maesil.models.encoders import encoder_of
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.models.primus import PrimusAutoencoder, codes_on_grid, rotary_positions
from maesil.models.registry import make_model
from maesil.training.begin import beginning
from maesil.types import Intensity

INTENSITY = Intensity((-900.0, 700.0), 0.4, 0.3)
pytestmark = pytest.mark.usefixtures("one_thread")


def a_model(**changed) -> PrimusAutoencoder:
    """Weights of a trained model's kind: none is zero or one, so that none can be left out unseen."""
    model = make_model(replace(SMALL, kind="primus", depth=2, **changed))
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return model.eval()


def a_volume(*shape: int) -> torch.Tensor:
    return torch.randint(-1200, 1500, shape, dtype=torch.int16, generator=torch.Generator().manual_seed(0))


LIBRARY = """
import numpy as np, torch
from safetensors.torch import load_file
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.utilities.load_weights_utils import handle_pos_embed_resize

def primus(shape, state):
    heads, registers = {heads}, {registers}
    network = Primus(1, {width}, (8, 8, 8), 2, {depth}, heads, shape, num_register_tokens=registers,
                     init_values=0.1, scale_attn_inner=True)
    state = dict(state)
    if tuple(shape) != {crop}:
        own = {{name.removeprefix("eva."): value for name, value in state.items()}}
        target = {{"pos_embed": network.eva.pos_embed}}
        handle_pos_embed_resize(own, target, "interpolate_trilinear", shape, {crop}, (8, 8, 8))
        state["eva.pos_embed"] = own["pos_embed"]
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(n.startswith(("up_projection", "mask_token")) for n in missing), (missing, unexpected)
    return network.eval()

def tokens(network, image):
    x = network.down_projection(image).flatten(2).transpose(1, 2)
    if network.register_tokens is not None:
        x = torch.cat([network.register_tokens.expand(len(x), -1, -1), x], dim=1)
    return network.eva(x)[0][:, {registers}:]

state = load_file("weights.safetensors")
with torch.no_grad():
    for name in ("crop", "larger"):
        image = torch.from_numpy(np.load(name + ".npy"))
        np.save(name + "_there.npy", tokens(primus(tuple(image.shape[2:]), state), image).numpy())
"""


@with_nnunet
@pytest.mark.slow
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("crop, larger", [(32, (48, 40, 64)), ((16, 24, 40), (24, 24, 48))])
def test_the_library_gives_the_same_tokens(tmp_path, registers, crop, larger):
    if registers:
        larger = (32,) * 3 if crop == 32 else crop  # nnU-Net resizes no codes that registers stand before
    encoder = encoder_of(a_model(crop=crop, width=132, registers=registers), INTENSITY)  # of two heads
    config = encoder.config
    save_file(primus_state(encoder), tmp_path / "weights.safetensors")
    ours = {}
    for name, shape in (("crop", config.crop_zyx), ("larger", larger)):
        volume = a_volume(2, *shape)
        image = ((volume.float().clamp(-900, 700) + 900) / 1600 - 0.4) / 0.3
        np.save(tmp_path / f"{name}.npy", image[:, None].numpy())
        with torch.no_grad():
            ours[name] = encoder(volume)
    facts = {"heads": config.heads, "width": config.width, "depth": config.depth, "crop": config.crop_zyx}
    run_there(LIBRARY.format(registers=registers, **facts), tmp_path)
    for name, found in ours.items():
        there = torch.from_numpy(np.load(tmp_path / f"{name}_there.npy"))
        assert there.std() > 0.1
        torch.testing.assert_close(found, there, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tokens_of_the_visible_patches_are_those_of_a_sequence_without_the_hidden_ones():
    model, volume = a_model(registers=2), a_volume(2, 32, 32, 32)
    masks = make_masks(MaskConfig(), model.config.grid, [1, 2])
    inputs = MaskedInput(volume, masks, INTENSITY, 8)
    latent = model.forward_encoder(inputs.visible_patches(torch.float32), masks.ids_keep)
    # In another order the same tokens: nothing but its place tells a token where it stands.
    order = torch.randperm(latent.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = model.forward_encoder(inputs.visible_patches(torch.float32)[:, order], masks.ids_keep[:, order])
    torch.testing.assert_close(shuffled, latent[:, order], rtol=1e-4, atol=1e-5)
    # What is hidden changes nothing.
    other = volume.clone().view(2, 4, 8, 4, 8, 4, 8).permute(0, 1, 3, 5, 2, 4, 6).reshape(2, 64, 512)
    other.scatter_(1, masks.ids_masked[..., None].expand(-1, -1, 512), 77)
    other = other.view(2, 4, 4, 4, 8, 8, 8).permute(0, 1, 4, 2, 5, 3, 6).reshape(2, 32, 32, 32)
    assert not torch.equal(other, volume)
    again = MaskedInput(other, masks, INTENSITY, 8).visible_patches(torch.float32)
    torch.testing.assert_close(model.forward_encoder(again, masks.ids_keep), latent, rtol=0, atol=0)


@torch.no_grad()
def test_the_encoder_by_itself_gives_the_latent_of_its_model():
    model, volume = a_model(registers=1), a_volume(2, 32, 32, 32)
    masks = make_masks(MaskConfig(kind="none"), model.config.grid, [0, 0])
    inputs = MaskedInput(volume, masks, INTENSITY, 8)
    latent = model.forward_encoder(inputs.visible_patches(torch.float32), masks.ids_keep)
    torch.testing.assert_close(encoder_of(model, INTENSITY)(volume), latent, rtol=0, atol=0)


def test_rotary_positions_know_distances_alone():
    rotary = rotary_positions((4, 5, 6), 48).view(4, 5, 6, 24, 2)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 24, 2, generator=generator)

    def product(at, other):
        turned = []
        for pair, place in ((query, at), (key, other)):
            sin, cos = rotary[place].unbind(-1)
            turned.append(torch.stack([pair[:, 0] * cos - pair[:, 1] * sin, pair[:, 1] * cos + pair[:, 0] * sin]))
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product((0, 1, 2), (1, 3, 3)), product((2, 2, 4), (3, 4, 5)))
    assert abs(product((0, 1, 2), (1, 3, 3)) - product((0, 1, 2), (1, 3, 4))) > 1e-3


def test_learnt_codes_stay_on_their_own_grid_and_keep_registers_on_another():
    codes = torch.randn(2 + 24, 6, generator=torch.Generator().manual_seed(0))
    assert codes_on_grid(codes, 2, (2, 3, 4), (2, 3, 4)) is codes
    larger = codes_on_grid(codes, 2, (2, 3, 4), (4, 6, 8))
    assert larger.shape == (2 + 192, 6) and torch.equal(larger[:2], codes[:2])
    corners = larger[2:].view(4, 6, 8, 6)
    torch.testing.assert_close(corners[0, 0, 0], codes[2])
    torch.testing.assert_close(corners[-1, -1, -1], codes[-1])


def test_presets_have_the_sizes_of_the_library():
    sizes = {
        name: (c.model.width, c.model.depth, c.model.heads, c.model.patch, c.model.registers)
        for name, c in PRESETS.items()
        if c.model.kind == "primus"
    }
    assert sizes == {
        "primus-s": (396, 12, 6, 8, 0), "primus-b": (792, 12, 12, 8, 0), "primus-m": (864, 16, 12, 8, 0),
        "primus-l": (1056, 24, 16, 8, 0),
    }  # fmt: skip


@pytest.mark.parametrize("changed, told", [
    ({"width": 100}, "model.width=100: expected a multiple of 66 or 72"), ({"width": 0}, "model.width=0"),
    ({"registers": -1}, "at least 0"), ({"kind": "maesil", "registers": 1}, "0 with model.kind=maesil"),
])  # fmt: skip
def test_sizes_that_have_no_whole_heads_are_refused(changed, told):
    with pytest.raises(UsageError, match=told):
        ModelConfig(**{"kind": "primus", "width": 48, **changed})


def test_deeper_blocks_begin_smaller():
    model = make_model(replace(SMALL, kind="primus", depth=8))
    model.init_weights(torch.Generator().manual_seed(0))
    first, last = (model.blocks[number].attn.proj.weight.detach().std() for number in (0, 7))
    assert float(first / last) == pytest.approx(8**0.5, rel=0.1)
    assert float(model.blocks[0].attn.q_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_another_run_begins_with_the_learnt_codes_of_an_encoder():
    source = encoder_of(a_model(registers=1), INTENSITY)
    model = make_model(source.config)
    model.init_weights(torch.Generator().manual_seed(7))
    beginning(source, model)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
