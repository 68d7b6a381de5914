from dataclasses import replace

import pytest
import torch

from maesil.config.schema import MaskConfig, ModelConfig
from maesil.models.faces import Known
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.models.patches import tokens_at
from maesil.models.picture_head import PictureHead
from maesil.models.registry import make_model
from maesil.types import Intensity

CONFIG = ModelConfig(crop=32, width=16, depth=1, decoder_width=12, decoder_depth=1)


@pytest.fixture
def inputs():
    volume = torch.randint(-1024, 1500, (4, 32, 32, 32), generator=torch.Generator().manual_seed(1)).short()
    return MaskedInput(volume, make_masks(MaskConfig(), CONFIG.grid, [1, 2, 3, 4]), Intensity(mean=0.4, std=0.3), 8)


@pytest.fixture
def model():
    made = make_model(CONFIG)
    made.init_weights(torch.Generator().manual_seed(0))
    return made


def test_no_gradient_of_the_pictures_reaches_the_model(inputs, model):
    inputs.loss(model(inputs).pictured_BSV).backward()
    reached = {name.partition(".")[0] for name, one in model.named_parameters() if one.grad is not None}
    assert reached == {"picture_head"}


def test_only_the_chosen_crops_are_pictured(inputs, model):
    everything = model(inputs).pictured_BSV
    some = model(replace(inputs, pictured=slice(1, None, 2)))
    assert some.patches_BSV.shape[0] == 4
    torch.testing.assert_close(some.pictured_BSV, everything[1::2])
    cut = inputs.of(slice(1, None, 2))
    torch.testing.assert_close(cut.loss(some.pictured_BSV), inputs.loss(everything, _only_odd(inputs)))


def _only_odd(inputs):
    weight = torch.zeros(inputs.targets.shape)
    weight[1::2] = 1.0
    return weight


def test_it_starts_as_one_that_hardly_changes_the_inside_of_the_draft(inputs, model):
    prediction = model(inputs)
    difference = (prediction.pictured_BSV - prediction.patches_BSV).unflatten(-1, (8, 8, 8))[..., 3:5, 3:5, 3:5]
    assert difference.abs().mean() < 0.15 * prediction.patches_BSV.std()


def test_it_sees_the_true_voxels_beside_a_hidden_patch_and_not_those_behind():
    torch.manual_seed(0)
    head, masks = PictureHead(CONFIG), make_masks(MaskConfig(), CONFIG.grid, [0])
    true = torch.randn(1, 16, 512)
    decoded, draft = (tokens_at(torch.randn(1, 64, n), masks.ids_masked) for n in (12, 512))

    def predict(patches):
        return head(decoded, draft, masks.ids_masked, Known(patches, masks.ids_keep, torch.ones(1, 16) > 0))

    base, inner = predict(true), true.clone().reshape(1, 16, 8, 8, 8)
    inner[:, :, 1:-1, 1:-1, 1:-1] += 1.0
    assert torch.equal(predict(inner.reshape(1, 16, 512)), base)
    outer = true.clone().reshape(1, 16, 8, 8, 8)
    outer[:, :, 0] += 1.0
    assert not torch.allclose(predict(outer.reshape(1, 16, 512)), base, atol=1e-4)
