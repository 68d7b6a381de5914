from __future__ import annotations

import time

import torch
from rich.console import Console
from support.stores import make_store

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.data.intensity import measure_intensity
from maesil.data.sources import Sources
from maesil.models.registry import make_model
from maesil.training import setup
from maesil.training.setup import prepare
from maesil.training.trainer import Trainer


def test_a_budget_in_minutes_counts_the_wait_for_data(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s", [(32, 40, 36), (40, 32, 33)]).path

    class Slow:
        def __init__(self, loader):
            self.loader = loader

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return self.loader.__exit__(*error)

        def batches(self, start, stop):
            for batch in self.loader.batches(start, stop):
                time.sleep(0.2)
                yield batch

    loader, seconds, timed = Trainer.loader, 60.0, setup._TIMED_STEPS
    monkeypatch.setattr(Trainer, "loader", lambda self: Slow(loader(self)))
    model = ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1)
    settings = TrainConfig(steps=1, batch=2, crops_per_visit=timed // 2, device="cpu", threads=1)
    config = RunConfig(model, train=settings)
    trainer = prepare([store], config, tmp_path / "r", resume=False, console=Console(quiet=True))
    drawn = torch.get_rng_state()
    assert 0.5 * seconds / 0.2 < setup.steps_that_fit(trainer, seconds / 60) <= seconds / 0.2
    assert torch.equal(torch.get_rng_state(), drawn) and trainer.step == 0


def test_intensities_are_those_of_the_training_patients_alone(tmp_path):
    store = make_store(tmp_path / "s", [(32, 40, 36), (40, 32, 33), (24, 48, 40)]).path
    config = RunConfig(ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1))
    trainer = prepare([store], config, tmp_path / "r", resume=False, console=Console(quiet=True))
    sources, window = Sources.open([store], config.model), config.train.window
    assert trainer.intensity == measure_intensity(sources, trainer.split.train, window)
    assert trainer.intensity != measure_intensity(sources, sources.groups, window)


def test_the_first_weights_are_drawn_by_the_seed(tmp_path):
    store = make_store(tmp_path / "s", [(32, 40, 36), (40, 32, 33)]).path
    model = ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1)
    config = RunConfig(model, train=TrainConfig(seed=3))
    trainer = prepare([store], config, tmp_path / "r", resume=False, console=Console(quiet=True))
    expected = make_model(model)
    expected.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), expected.parameters(), strict=True))
