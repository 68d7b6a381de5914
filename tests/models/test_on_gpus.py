"""What compilers and several processes ask of a model: one graph, and a gradient for every parameter in every step."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from maesil.config.schema import HEADS, MaskConfig, ModelConfig
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import draw_noise, draw_targets, make_masks
from maesil.models.registry import make_model
from maesil.types import Intensity

CONFIG = ModelConfig(crop=32, width=16, depth=1, decoder_width=16, decoder_depth=1, channels=4, latent=4, codes=6)
DECODERS = [
    {"decoder": decoder, "head": head}
    for decoder, head in product(("full", "subset", "cross"), HEADS)
    if decoder == "full" or head != "interpolate"
]
PRIMUS = {"kind": "primus", "width": 18, "registers": 2}
MODELS = [*DECODERS, PRIMUS, *({"kind": kind} for kind in ("mae2d", "ae", "vae", "vqvae"))]


def made(changes, mask="dual"):
    config = replace(CONFIG, **changes)
    model = make_model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    volume = torch.randint(-1024, 1500, (2, 32, 32, 32), generator=torch.Generator().manual_seed(1)).short()
    masks = make_masks(MaskConfig(kind=mask), config.grid, [3, 4])
    lean = draw_targets(masks, config.decoded, [3, 4]) if config.decoder != "full" else None
    noise = draw_noise(model.noise_shape, [3, 4]) if model.noise_shape else None
    return model, MaskedInput(volume, masks, Intensity(mean=0.4, std=0.3), 8, ids_target=lean, noise=noise)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [MODELS[3], {"decoder": "cross"}, *MODELS[-5:]])
def test_a_training_step_is_one_graph(changes, one_thread):
    model, inputs = made(changes)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(inputs)
    assert (found.graph_count, found.graph_break_count) == (1, 0), [str(one.reason) for one in found.break_reasons]


@pytest.mark.parametrize("mask", ["dual", "none"])
@pytest.mark.parametrize("changes", MODELS)
def test_every_parameter_takes_part_in_every_step(changes, mask):
    # DistributedDataParallel waits for the gradient of each; one that never comes is an error at the next step.
    model, inputs = made(changes, mask)
    prediction = model(inputs)
    loss = inputs.loss(prediction.patches_BSV)
    if prediction.pictured_BSV is not None:
        loss = loss + inputs.loss(prediction.pictured_BSV)
    (loss if prediction.auxiliary_loss is None else loss + prediction.auxiliary_loss).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
