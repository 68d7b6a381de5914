"""Training steps by the definitions and by Triton, interpreted, come to the same losses."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support.kernel_cases import PatchSpec, make_patches
from support.stores import make_store

from maesil import kernels
from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.training.train import train


def losses_of_steps(choice: str) -> list[float]:
    """Train an embedding, a mask token, position codes and a head on scans with all that a lookup knows."""
    spec = PatchSpec(batch=2, grid=(2, 2, 3), patch=4, margin=(3, 5, 8), flip=True, per_sample_window=True, share=1.0)
    case = make_patches(spec, "cpu")
    ids_keep, ids_masked = case.ids[:, :4], case.ids[:, 4:]
    ids_restore = case.ids.argsort(dim=1)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) * 0.1 for shape in [(64, 24), (24,), (12, 24), (24, 64)]]
    embed, mask_token, pos_embed, head = weights = [weight.requires_grad_() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    with kernels.use_kernels(choice):
        for _ in range(5):
            visible = kernels.gather_patches(case.volume, ids_keep, dtype=torch.float32, **case.options) @ embed
            tokens = kernels.unshuffle_tokens(visible, mask_token, pos_embed, ids_restore, ids_masked)
            loss = kernels.masked_reconstruction_loss(
                tokens.tanh() @ head, case.volume, ids_masked, weight=case.weight[:, 4:], **case.options
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_steps_with_origin_flip_windows_and_weights():
    by_definition, by_triton = losses_of_steps("reference"), losses_of_steps("triton")
    assert by_triton == pytest.approx(by_definition, rel=1e-4)
    assert by_definition[-1] < 0.95 * by_definition[0]


def test_maesil_train_either_way_and_resumed_the_other_way(tmp_path):
    store = make_store(tmp_path / "s", [(16, 32, 16), (16, 16, 32)], superpatch=16).path
    model = ModelConfig(crop=16, width=8, depth=1, decoder_width=8, decoder_depth=1)
    settings = TrainConfig(steps=2, batch=2, validation_crops=1, device="cpu", threads=1, flips="zyx", min_body=0.0)

    def losses(name: str, choice: str, steps: int, resume: bool = False) -> list[float]:
        config = RunConfig(model, train=replace(settings, kernels=choice, steps=steps))
        train([store], config, tmp_path / name, resume=resume, console=Console(file=io.StringIO()))
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [value for line in lines for key, value in json.loads(line).items() if key.endswith("loss")]

    by_definition, by_triton = losses("reference", "reference", 2), losses("triton", "triton", 2)
    assert by_triton == pytest.approx(by_definition, rel=1e-4)
    assert losses("triton", "reference", 3, resume=True) == pytest.approx(
        losses("reference", "triton", 3, resume=True), rel=1e-4
    )
