"""What ``train.compile`` compiles: whole graphs, and none again after the first step, whatever a step's crops are."""

from __future__ import annotations

import functools
import io
import itertools
from dataclasses import replace

import pytest
import torch
import torch._dynamo
from rich.console import Console
from support.lanes import slow_but
from support.stores import make_store
from torch._dynamo.utils import counters

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.training.setup import prepare

SMALL = ModelConfig(crop=16, width=32, depth=1, decoder_width=32)
CONVOLUTIONAL = {"channels": 4, "latent": 8, "codes": 16}
STEPS = 4
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "store.zarr"
    make_store(path, [(32, 40, 48), (48, 32, 40)], superpatch=32)  # no two scans alike
    return path


@pytest.fixture
def graphs_after(store, tmp_path, monkeypatch):
    """Train compiled, without a compiler; return how many graphs there are after each step, all without a break."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    compiled, graphs = torch.compile, []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(compiled, backend=backend))

    def counted(model: ModelConfig, **train) -> list[int]:
        settings = TrainConfig(
            **{"batch": 4, "steps": 100, "device": "cpu", "validation": 0.0, "compile": True, **train}
        )
        trainer = prepare(
            [store],
            RunConfig(model, train=settings),
            tmp_path / "run",
            resume=False,
            console=Console(file=io.StringIO()),
        )
        after = []
        with trainer.loader() as loader:
            for ready in itertools.islice(trainer.prepared(loader.batches(0, STEPS)), STEPS):
                trainer.training_step(ready)
                after.append(len(graphs))
        trainer.read()
        assert counters["graph_break"] == {}
        return after

    yield counted
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.parametrize(
    "model",
    slow_but(
        [
            SMALL,
            replace(SMALL, decoder="subset"),
            replace(SMALL, decoder="cross"),
            replace(SMALL, head="refine"),
            replace(SMALL, picture_head="none"),
            *(replace(SMALL, kind=kind, **CONVOLUTIONAL) for kind in ("mae2d", "ae", "vae", "vqvae")),
        ],
        (SMALL,),
    ),
    ids=lambda model: f"{model.kind}, {model.decoder}, {model.head}, {model.picture_head}",
)
def test_a_step_is_one_graph_compiled_once(graphs_after, model):
    assert graphs_after(model, flips="zyx", window_jitter=0.1) == [1] * STEPS


def test_scans_on_the_device_are_one_graph_too(graphs_after):
    assert graphs_after(SMALL, device_resident=True) == [1] * STEPS


@pytest.mark.parametrize(
    ("batch", "accumulate", "every", "graphs"),
    [
        (4, 2, 4, 2),
        pytest.param(8, 4, 4, 2, marks=pytest.mark.slow),
        pytest.param(12, 4, 4, 4, marks=pytest.mark.slow),
        pytest.param(90, 10, 10, 10, marks=pytest.mark.slow),
    ],  # the first pictured crop lies at 0, or at 0, 1, 2 ..
)
def test_micro_batches_have_a_graph_for_each_place_of_a_pictured_crop(graphs_after, batch, accumulate, every, graphs):
    found = graphs_after(SMALL, batch=batch, accumulate=accumulate, picture_head_every=every)
    assert found == [graphs] * STEPS
