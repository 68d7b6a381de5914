"""What lies outside the scan decides nothing: stores that differ there alone train and score alike, to the bit.

Cells with ``valid`` 0 hold noise in one store; partly valid cells hold -1024 outside the scan, as the format says.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support.lanes import slow_but
from support.stores import add_volume, cells, make_store, synthetic_hu

from maesil.config.schema import MaskConfig, ModelConfig, RunConfig, TrainConfig
from maesil.data import blocks, crops
from maesil.data.crops import patch_shares
from maesil.data.loader import CropLoader
from maesil.evaluation.evaluate import evaluate
from maesil.evaluation.predict import ModelPredictor
from maesil.evaluation.reconstruct import predict_while_hidden
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.training.checkpoint import load_run
from maesil.training.setup import prepare
from maesil.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread", "plain_runs")

SHAPES = ((48, 44, 40), (40, 48, 56), (48, 40, 48))
TRAIN = TrainConfig(
    steps=5, batch=3, validate_every=2, validation_crops=4, min_body=0.0, flips="zyx", window_jitter=0.1, ema=0.5,
    device="cpu",
)  # fmt: skip
CONFIGS = {
    "maesil": RunConfig(ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1), train=TRAIN),
    "whole superpatches, patches of two cells": RunConfig(
        ModelConfig(crop=32, patch=16, width=16, depth=1, decoder_width=16, decoder_depth=1, head="overlap"),
        MaskConfig(kind="random", share=0.5),
        TRAIN,
    ),
    "ae, nothing hidden": RunConfig(
        ModelConfig(kind="ae", crop=32, channels=4, latent=8), MaskConfig(kind="none"), TRAIN
    ),
}


def write_store(path: Path, noisy: bool) -> Path:
    """Three patients whose scans are cones: what a resampled oblique or tilted scan leaves in its box."""
    store = make_store(path, [], superpatch=32)
    for number, shape in enumerate(SHAPES):
        z, _, x = np.indices(shape)
        valid = x + z // 2 > 14 + 4 * number
        hu = np.where(valid, synthetic_hu(shape, number), -1024).astype(np.int16)
        body = (hu > -950) & valid
        if noisy:
            outside = np.kron(cells(valid) == 0, np.ones((8, 8, 8), dtype=bool))[tuple(slice(0, n) for n in shape)]
            noise = np.random.default_rng(number).integers(-1024, 3072, shape)
            hu = np.where(outside, noise, hu).astype(np.int16)
        add_volume(store, hu, name=f"patient {number}", valid=valid, body=body)
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("outside")
    return write_store(folder / "clean", noisy=False), write_store(folder / "noisy", noisy=True)


def run(store: Path, out: Path, config: RunConfig) -> list[dict[str, float]]:
    """Train; return the records of all steps, without the times they took."""
    train([store], config, out)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured = ("loss", "grad_norm", "validation_loss", "validation_psnr")
    return [{name: record[name] for name in measured if name in record} for record in map(json.loads, lines)]


@pytest.mark.parametrize("name", slow_but(CONFIGS, ("maesil",)))
def test_losses_gradients_validation_and_scores_are_equal_to_the_bit(stores, tmp_path, name):
    config = CONFIGS[name]
    clean, noisy = (run(store, tmp_path / store.name, config) for store in stores)
    assert clean == noisy
    assert len(clean) == 5 and sum("validation_loss" in record for record in clean) == 3

    runs = [load_run(tmp_path / store.name) for store in stores]
    assert runs[0].intensity == runs[1].intensity and runs[0].split == runs[1].split
    for of_clean, of_noisy in ([one.last_weights for one in runs], [one.model.state_dict() for one in runs]):
        assert all(torch.equal(of_clean[key], of_noisy[key]) for key in of_clean)

    reports = [evaluate(tmp_path / store.name, store, device="cpu") for store in stores]
    for part in ("rows", "rows_other", "per_volume"):
        assert getattr(reports[0], part) == getattr(reports[1], part)
    scored = 1 + (config.model.kind == "maesil") + 2 * (config.mask.kind != "none")  # with the tokens alone
    assert len(reports[0].per_volume) == len(reports[0].rows) == 2 * scored


def test_reconstructions_are_equal_to_the_bit(stores, tmp_path):
    run(stores[0], tmp_path / "run", CONFIGS["maesil"])
    trained, predicted = load_run(tmp_path / "run"), []
    for store in map(Store.open, stores):
        reader, predictor = SuperpatchReader(store), ModelPredictor(trained.model, trained.intensity)
        volume = store.volumes()[0]
        predicted.append(predict_while_hidden(reader, volume, predictor, trained.config, 0, torch.device("cpu")).hu_ZYX)
    assert torch.equal(*predicted)


def test_a_patch_that_lies_partly_outside_counts_nothing_in_the_loss(stores, tmp_path):
    config = CONFIGS["maesil"]
    trainer = prepare([stores[0]], config, tmp_path / "run", resume=False, console=Console(quiet=True))
    with CropLoader(trainer.sampler, batch=3, readers=1) as loader:
        partly = (one for one in loader.batches(0, 5) if ((one.valid > 0) & (one.valid < 255)).sum() > 3)
        batch = next(partly)
    step = trainer._micro_batch(batch, 0)
    shares = patch_shares(batch.valid, 8, batch.flip).gather(1, step.inputs.targets)
    assert ((shares > 0) & (shares < 1)).any()
    assert torch.equal(step.weight_BS, (shares == 1).float())

    pred = torch.zeros(*step.weight_BS.shape, 512)
    loss = step.inputs.loss(pred, step.weight_BS)
    pred[(shares > 0) & (shares < 1)] = 100.0
    assert step.inputs.loss(pred, step.weight_BS) == loss


def test_the_stores_do_differ_and_it_is_the_loader_that_makes_up_for_it(stores, tmp_path, monkeypatch):
    readers = [SuperpatchReader(Store.open(store)) for store in stores]
    for volume_id, volume in readers[0].volumes.items():
        clean, noisy = (reader.read_region(volume_id, (0, 0, 0), volume.shape) for reader in readers)
        assert (clean != noisy).mean() > 0.02
        assert np.array_equal(readers[0].read_map(volume_id, "valid"), readers[1].read_map(volume_id, "valid"))
    for module in (crops, blocks):
        monkeypatch.setattr(module, "blank_outside_scan", lambda hu, valid: None)
    config = CONFIGS["maesil"]
    assert run(stores[0], tmp_path / "clean", config) != run(stores[1], tmp_path / "noisy", config)
