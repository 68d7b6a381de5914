from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from maesil.config.schema import ModelConfig, TrainConfig
from maesil.models.masked_autoencoder import MaskedAutoencoder
from maesil.models.registry import make_model
from maesil.training.optim import learning_rate, make_optimizer, parameter_groups, set_learning_rate, update_average

SMALL = ModelConfig(crop=16, width=8, depth=1, decoder_width=8, decoder_depth=1)


def test_only_matrices_decay_and_every_parameter_is_in_one_group():
    model = MaskedAutoencoder(SMALL)
    decaying, free = (group["params"] for group in parameter_groups(list(model.parameters()), 0.05))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in free} == {
        n for n in names.values() if n.endswith("bias") or "norm" in n or n == "mask_token"
    }
    assert all(names[id(p)].endswith("weight") for p in decaying)
    assert len(decaying) + len(free) == len(names)


def test_learning_rate_rises_then_falls_along_a_cosine():
    config = TrainConfig(steps=100, lr=2.0, warmup=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert all(earlier > later for earlier, later in pairwise(rates[10:]))
    assert 0 < rates[99] == pytest.approx(1 + math.cos(math.pi * 89 / 90))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_learning_rate_of_the_shortest_runs_is_positive(steps):
    assert all(learning_rate(step, TrainConfig(steps=steps)) > 0 for step in range(steps))


def test_a_step_without_gradient_decays_matrices_by_lr_times_decay_alone():
    model = MaskedAutoencoder(SMALL)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model, TrainConfig(lr=1.0, weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if parameter.ndim > 1 else 1.0))


def test_averaged_weights_follow_the_recurrence_and_forget_the_random_start():
    model, averaged = MaskedAutoencoder(SMALL), MaskedAutoencoder(SMALL)
    expected = next(averaged.parameters()).detach().clone()
    for step in range(1, 30):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, float(step))
        update_average(averaged, model, 0.8, step)
        kept = min(0.8, step / (step + 9))
        expected = kept * expected + (1 - kept) * step
    torch.testing.assert_close(next(averaged.parameters()).detach(), expected)
    assert (expected - 29).abs().max() < 5


def test_buffers_of_the_average_are_those_of_the_model():
    config = replace(SMALL, kind="vqvae", channels=4, latent=4, codes=4)
    model, averaged = make_model(config), make_model(config)
    model.codebook_Kc.copy_(torch.randn(4, 4))
    update_average(averaged, model, 0.9, 100)
    assert torch.equal(averaged.codebook_Kc, model.codebook_Kc)


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_muon_steps_along_an_orthogonal_matrix_as_far_as_adamw_would(shape):
    """A step's root mean square is 0.2 times the rate (arXiv 2502.16982), whatever the shape."""
    layer = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(shape[1], shape[0], bias=False)])})
    weight = layer["blocks"][0].weight
    optimizer, before = make_optimizer(layer, TrainConfig(weight_decay=0.0)), weight.detach().clone()
    set_learning_rate(optimizer, 0.01)
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    step = (weight.detach() - before) / 0.01
    assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.5 * values.max()


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = make_model(SMALL)
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.05))
    muon, adamw = optimizer.optimizers
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(one): name for name, one in model.named_parameters()}
    of_muon = {names[id(one)] for group in muon.param_groups for one in group["params"]}
    of_adamw = {names[id(one)] for group in adamw.param_groups for one in group["params"]}
    assert of_muon == {name for name, one in model.named_parameters() if "blocks." in name and one.ndim == 2}
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    assert isinstance(make_optimizer(make_model(replace(SMALL, kind="ae")), TrainConfig()), torch.optim.AdamW)


def test_several_optimisers_go_on_where_they_were_saved():
    def after(steps, state=None):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(
            {"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)]), "pred": torch.nn.Linear(4, 1)}
        )
        optimizer = make_optimizer(model, TrainConfig(optimizer="muon", lr=0.1))
        if state:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for _ in range(steps):
            optimizer.zero_grad()
            model["pred"](model["blocks"][0](torch.ones(2, 4))).square().sum().backward()
            set_learning_rate(optimizer, 0.01)
            optimizer.step()
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    halfway = after(3)
    assert all(torch.equal(a, b) for a, b in zip(after(3, halfway)[0].values(), after(6)[0].values(), strict=True))
