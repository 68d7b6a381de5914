"""A step of training against the same step written out in plain PyTorch."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from maesil.config.schema import MaskConfig, ModelConfig, RunConfig, TrainConfig
from maesil.errors import MaesilError
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.models.registry import make_model
from maesil.training.learner import Learner, MicroBatch
from maesil.training.optim import make_optimizer
from maesil.types import Intensity

pytestmark = pytest.mark.usefixtures("one_thread")

CLIP = 0.03
CONFIG = RunConfig(
    ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1, decorrelation=0.1),
    train=TrainConfig(
        steps=8, batch=4, accumulate=2, optimizer="adamw", lr=0.05, warmup=0.5, weight_decay=0.5, clip=CLIP, ema=0.9,
        device="cpu",
    ),
)  # fmt: skip


def parts(seed: int) -> list[MicroBatch]:
    """Two parts of two crops; one of them weighs little. The picture head draws one crop of each."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, scale in enumerate((1.0, 0.1)):
        volume = torch.randint(-1024, 1500, (2, 16, 16, 16), generator=generator).short()
        masks = make_masks(MaskConfig(), CONFIG.model.grid, [seed + 10 * number, seed + 10 * number + 1])
        inputs = MaskedInput(volume, masks, Intensity(mean=0.4, std=0.3), 8, pictured=slice(number, None, 2))
        weight = scale * torch.rand(inputs.targets.shape, generator=generator)
        made.append(MicroBatch(inputs, weight, weight[inputs.pictured]))
    return made


def started(config=CONFIG):
    torch.manual_seed(0)
    model = make_model(config.model)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model, config.train)
    return Learner(config=config, device=torch.device("cpu"), model=model, optimizer=optimizer)


def in_two(model):
    """The parameters of the model, and those of its picture head."""
    named = list(model.named_parameters())
    return [[one for name, one in named if name.startswith("picture_head.") == beside] for beside in (False, True)]


def gradient_norms(model):
    return [math.sqrt(sum(one.grad.square().sum().item() for one in some)) for some in in_two(model)]


def by_hand(model, steps):
    """Take steps; return losses, norms and the moving average."""
    settings, average = CONFIG.train, copy.deepcopy(model)
    decaying, free = ([one for one in model.parameters() if (one.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": decaying, "weight_decay": 0.5}, {"params": free, "weight_decay": 0.0}]
    optimizer, told = torch.optim.AdamW(groups, betas=settings.betas), []
    for step in range(steps):
        dealt = parts(step)
        predictions = [model(part.inputs) for part in dealt]
        loss = _mean([p.inputs.loss(q.patches_BSV, p.weight_BS) for p, q in zip(dealt, predictions, strict=True)],
                     [p.weight_BS.sum() for p in dealt])  # fmt: skip
        drawn = _mean([p.inputs.of(p.inputs.pictured).loss(q.pictured_BSV, p.picture_weight_BS)
                       for p, q in zip(dealt, predictions, strict=True)],
                      [p.picture_weight_BS.sum() for p in dealt])  # fmt: skip
        apart = sum(0.1 * one.auxiliary_loss for one in predictions) / 2
        for one in model.parameters():
            one.grad = None
        (loss + drawn + apart).backward()
        norms = gradient_norms(model)
        for some, norm in zip(in_two(model), norms, strict=True):
            for one in some:
                one.grad *= min(1.0, CLIP / norm)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (step + 1) / 4
        optimizer.step()
        kept = min(0.9, (step + 1) / (step + 10))
        for mean, one in zip(average.parameters(), model.parameters(), strict=True):
            mean.data = kept * mean.data + (1 - kept) * one.data
        told.append((loss.item(), *norms))
    return told, average


def _mean(losses, weights):
    return sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)


def test_steps_are_those_of_their_definition():
    """Weighted loss over both parts, gradients clipped, the rate of this very step, the average that follows."""
    learner, ours = started(), []
    model = copy.deepcopy(learner.model)
    told, average = by_hand(model, 3)
    for step in range(3):
        learner.learn(parts(step))
        record = learner.read()
        ours.append((record["loss"], record["grad_norm"], record["picture_grad_norm"]))
        assert record["lr"] == pytest.approx(0.05 * (step + 1) / 4)
        assert gradient_norms(learner.model) == pytest.approx([CLIP, CLIP], rel=1e-3)
    assert ours == [pytest.approx(one, rel=1e-3) for one in told]
    assert all(min(norms) > CLIP for _, *norms in told), "nothing was clipped: this test shows less than it says"
    for mine, theirs in ((learner.model, model), (learner.final_model, average)):
        for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            if not name.endswith("qkv.bias"):  # that of keys has no gradient but rounding
                told = f"{name}: {{}}".format
                torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4, msg=told)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_whose_loss_is_not_finite_and_all_after_it_change_nothing(optimizer):
    config = replace(CONFIG, train=replace(CONFIG.train, optimizer=optimizer))
    learner = started(config)
    learner.learn(parts(0))
    before = copy.deepcopy(learner.model.state_dict())
    bad = [replace(one, weight_BS=one.weight_BS * math.nan) for one in parts(1)]
    for dealt in (bad, parts(2)):
        learner.learn(dealt)
    assert all(torch.equal(one, before[name]) for name, one in learner.model.state_dict().items())
    with pytest.raises(MaesilError, match="step 2: loss nan"):
        learner.read()


def test_the_weight_of_the_auxiliary_loss_follows_the_steps_done():
    """A VAE warms the weight of its divergence up over 0.3 of the steps."""
    small = ModelConfig(kind="vae", crop=16, channels=4, latent=4, penalty=0.5)
    learner = started(RunConfig(small, train=replace(CONFIG.train, accumulate=1)))
    prediction = learner.model(parts(0)[0].inputs)
    learner.step = 1
    expected = 0.5 * (1 / 8 / 0.3) * prediction.auxiliary_loss
    torch.testing.assert_close(learner._auxiliary_loss(prediction), expected)
