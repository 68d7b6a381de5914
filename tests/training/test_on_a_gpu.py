"""Every model, head and command on a pretended GPU: nothing mixes devices, and streams keep their order."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support.labelled import labelled_store
from support.pretend_gpu import pretend_gpu
from support.runs import save_run
from support.stores import make_store

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.data.split import Split
from maesil.downstream.features import write_features
from maesil.downstream.finetune import Budget, finetune
from maesil.downstream.probe import probe
from maesil.evaluation.evaluate import evaluate
from maesil.evaluation.reconstruct import reconstruct_volume
from maesil.training import throughput
from maesil.training.checkpoint import load_run
from maesil.training.train import train

GPU = "cuda:0"
MODEL = ModelConfig(
    crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1, channels=4, latent=4, codes=6, head="linear"
)
TRAIN = TrainConfig(
    steps=3, batch=4, device=GPU, kernels="reference", threads=1, validation_crops=4, flips="zyx", window_jitter=0.05,
    min_body=0.05, validate_every=2, ema=0.9,
)  # fmt: skip
MODELS = {
    **{kind: {"kind": kind} for kind in ("mae2d", "ae", "vae", "vqvae")},
    **{head: {"head": head} for head in ("linear", "overlap", "interpolate", "refine")},
    **{decoder: {"decoder": decoder} for decoder in ("subset", "cross")},
}


@pytest.fixture(autouse=True)
def small_peak(monkeypatch, one_thread):
    monkeypatch.setitem(throughput._EDGE, "cuda", 64)
    throughput.measure_peak.cache_clear()
    yield
    throughput.measure_peak.cache_clear()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    make_store(path, [(32, 40, 36), (40, 32, 33), (32, 32, 48)], superpatch=32)
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return labelled_store(tmp_path_factory.mktemp("labelled"), 3)


def run(store, out, model, **changes):
    config = RunConfig(replace(MODEL, **model), train=replace(TRAIN, **changes))
    console = Console(file=io.StringIO())
    train([store], config, out, console=console)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", MODELS)
def test_training_on_a_gpu_is_training(store, tmp_path, name):
    with pretend_gpu():
        ours = run(store, tmp_path / "gpu", MODELS[name])
    expected = run(store, tmp_path / "cpu", MODELS[name], device="cpu")
    for one, other in zip(ours, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)  # bfloat16
        assert one.get("validation_loss") == pytest.approx(other.get("validation_loss"), rel=0.05)
    resumed = load_run(tmp_path / "gpu")
    assert all(torch.isfinite(value).all() for value in resumed.model.state_dict().values())


@pytest.mark.parametrize("name", MODELS)
def test_every_command_runs_on_a_gpu(labelled, tmp_path, name):
    store, labels, volumes = labelled
    model = replace(MODEL, **MODELS[name])
    path = save_run(tmp_path / "run", Split((volumes[0].group,), ()), model)
    with pretend_gpu():
        report = evaluate(path, store.path, device=GPU)
        assert report.document()["rows"]
        assert write_features(path, store.path, tmp_path / "f.parquet", device=GPU) > 0
        assert reconstruct_volume(path, store.path, volumes[1].volume_id, device=GPU).psnr > 0
        if name in ("linear", "mae2d", "ae", "vae", "vqvae"):
            assert probe(path, store.path, labels, patches=300, device=GPU).rows
            budget = Budget(steps=2, batch=1, seeds=1)
            assert finetune(path, store.path, labels, tmp_path / "tuned", budget=budget, device=GPU).rows
