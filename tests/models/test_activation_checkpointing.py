"""Blocks computed anew on the way back: the same loss and gradients to the bit, and less memory."""

from __future__ import annotations

import pytest
import torch
from support.activations import kept_bytes

from maesil.config.schema import MaskConfig, ModelConfig
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import draw_noise, draw_targets, make_masks
from maesil.models.registry import make_model
from maesil.types import Intensity

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = {
    "maesil": {}, "subset": {"decoder": "subset"}, "cross": {"decoder": "cross"}, "refine": {"head": "refine"},
    "primus": {"kind": "primus", "width": 66, "registers": 2},
    "mae2d": {"kind": "mae2d"}, "ae": {"kind": "ae"}, "vae": {"kind": "vae"}, "vqvae": {"kind": "vqvae"},
}  # fmt: skip


def learnt(options: dict[str, str], checkpointing: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    sizes = {"crop": 32, "width": 64, "depth": 4, "decoder_width": 64, "decoder_depth": 2, "channels": 8, "latent": 16}
    config = ModelConfig(**{**sizes, **options})
    model = make_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.activation_checkpointing = checkpointing
    torch.manual_seed(0)
    masks = make_masks(MaskConfig(), config.grid, [3, 4])
    volume = torch.randint(-1024, 1500, (2, 32, 32, 32), generator=torch.Generator().manual_seed(1)).short()
    noise = None if model.noise_shape is None else draw_noise(model.noise_shape, [5, 6])
    targets = draw_targets(masks, 0.5, [7, 8]) if options.get("decoder") else None
    inputs = MaskedInput(
        volume, masks, Intensity((-500.0, 700.0), 0.4, 0.3), config.patch, noise=noise, ids_target=targets
    )

    def forward():
        prediction = model(inputs)
        shown = inputs.loss(prediction.patches_BSV) + inputs.loss(prediction.shown)
        return shown if prediction.auxiliary_loss is None else shown + prediction.auxiliary_loss

    loss, kept = kept_bytes(forward, [*model.parameters(), *model.buffers(), volume])
    loss.backward()
    return loss.detach(), [one.grad for one in model.parameters() if one.grad is not None], kept


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_same_to_the_bit_for_less_memory(name):
    (loss, gradients, kept), (loss_anew, gradients_anew, kept_anew) = (
        learnt(MODELS[name], checkpointing) for checkpointing in (False, True)
    )
    assert torch.equal(loss, loss_anew)
    assert len(gradients) == len(gradients_anew) > 10
    assert all(torch.equal(one, other) for one, other in zip(gradients, gradients_anew, strict=True))
    # Blocks keep their input alone; what the heads keep stays.
    assert kept_anew < (0.8 if name == "refine" else 0.65) * kept


def test_nothing_is_computed_twice_where_nothing_is_learnt():
    model = make_model(ModelConfig(crop=32, width=16, depth=1, decoder_width=16))
    model.activation_checkpointing = True
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.zeros(1, 3, 16)
    model.eval()
    model.through(model.blocks[0], tokens).sum().backward()
    assert len(calls) == 1
    model.train()
    model.through(model.blocks[0], tokens.requires_grad_()).sum().backward()
    assert len(calls) == 3
