"""New runs from old weights: what is taken, what is refused, and whom the weights have seen."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support.lanes import slow_but
from support.stores import make_store

import maesil
from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.data.known_scans import EARLIER, known_scans
from maesil.data.split import Split
from maesil.downstream.export import export_encoder
from maesil.errors import CheckpointError
from maesil.evaluation.evaluate import evaluate
from maesil.training.checkpoint import load_run
from maesil.training.train import train
from maesil.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = RunConfig(
    ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1),
    train=TrainConfig(steps=3, batch=2, lr=1e-12, weight_decay=0.0, warmup=0.0, device="cpu", threads=1, ema=0.5),
)
"""With this rate weights stay where they begin, but for rounding."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store of three patients, and a run that has seen two of them."""
    root = tmp_path_factory.mktemp("begin")
    store = make_store(root / "store", [(32, 40, 36), (40, 32, 33), (32, 32, 48)], superpatch=32)
    one, two, three = sorted(volume.group for volume in store.volumes())
    config = replace(CONFIG, train=replace(CONFIG.train, lr=5e-3))
    told(root / "store", config, root / "first", split=Split((one, two), (), (three,)))
    export_encoder(root / "first", root / "encoder")
    return root, (one, two, three)


def told(store, config, out, **options):
    console = Console(file=io.StringIO(), width=300)
    train([store], config, out, console=console, **options)
    return console.file.getvalue()


def test_a_run_begins_with_the_averaged_weights_of_another(place, tmp_path):
    root, (one, two, three) = place
    said = told(root / "store", CONFIG, tmp_path / "r", split=Split((two, three), (one,)), init_from=root / "first")
    before, after = load_run(root / "first"), load_run(tmp_path / "r")
    assert not torch.equal(before.model.patch_embed.weight, before.last_weights["patch_embed.weight"])
    for name, value in before.model.state_dict().items():
        torch.testing.assert_close(after.last_weights[name], value, rtol=0, atol=1e-6)
    assert f"the first weights are those of {root / 'first'}" in said
    assert "1 patient held out, seen by these weights before" in said


def test_whom_the_first_weights_have_seen_is_not_scored_as_new(place, tmp_path):
    root, (one, two, three) = place
    told(root / "store", CONFIG, tmp_path / "r", split=Split((three,), ()), init_from=root / "first")
    assert known_scans([tmp_path / "r"]).groups(EARLIER) == {one, two}
    with pytest.raises(maesil.errors.UsageError, match="nothing is left to score fairly"):
        evaluate(tmp_path / "r", root / "store", device="cpu")


def test_an_encoder_fits_other_decoders_and_says_nothing_of_its_scans(place, tmp_path):
    root, _ = place
    config = replace(CONFIG, model=replace(CONFIG.model, crop=32, decoder_width=32, decoder_depth=2))
    encoder = maesil.load_encoder(root / "encoder")
    said = told(root / "store", config, tmp_path / "r", init_from=encoder)
    after = load_run(tmp_path / "r").last_weights
    for name, value in encoder.net.state_dict().items():
        if name != "pos_embed":
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    assert "does not say which scans it has seen" in said


@pytest.mark.parametrize("source", slow_but(("first", "encoder"), ("first",)))
def test_a_requeued_job_goes_on_from_its_checkpoint_and_not_from_the_first_weights(place, tmp_path, source):
    root, (one, _, three) = place
    config = replace(CONFIG, train=replace(CONFIG.train, lr=5e-3, steps=4))
    half = replace(config, train=replace(config.train, steps=2))
    options = {"split": Split((one, three), ()), "resume": "auto"}
    options["init_from"] = root / "first" if source == "first" else maesil.load_encoder(root / "encoder")
    told(root / "store", config, tmp_path / "whole", **options)
    assert "the first weights are those of" in told(root / "store", half, tmp_path / "r", **options)
    said = told(root / "store", config, tmp_path / "r", **options)
    assert "the run began with the weights of" in said and "goes on from its checkpoint" in said
    assert load_run(tmp_path / "r").step == 4 and "the first weights are those of" not in said
    before = (tmp_path / "r" / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"begun with the weights of .*, now --init-from .*: other weights;"):
        told(root / "store", config, tmp_path / "r", **{**options, "init_from": tmp_path / "whole"})
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before


def test_a_requeued_job_takes_the_steps_that_an_undisturbed_one_takes(place, tmp_path, monkeypatch):
    root, (one, _, three) = place
    config = replace(CONFIG, train=replace(CONFIG.train, lr=5e-3, steps=4, checkpoint_every=2))
    options = {"split": Split((one, three), ()), "resume": "auto", "init_from": root / "first"}
    told(root / "store", config, tmp_path / "whole", **options)

    class Killed(BaseException):
        pass

    take, taken = Trainer.training_step, []

    def killed_in_the_third_step(self, ready):
        if len(taken) == 2:
            raise Killed
        taken.append(take(self, ready))

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "training_step", killed_in_the_third_step)
        told(root / "store", config, tmp_path / "r", **options)
    assert load_run(tmp_path / "r").step == 2
    told(root / "store", config, tmp_path / "r", **options)
    for name, value in load_run(tmp_path / "whole").last_weights.items():
        assert torch.equal(value, load_run(tmp_path / "r").last_weights[name])


@pytest.mark.parametrize("source", ["first", "encoder"])
@pytest.mark.parametrize("changes", [{"width": 32}, {"depth": 2}, {"patch": 4}, {"kind": "ae", "latent": 8}])
def test_weights_that_do_not_fit_are_refused(place, tmp_path, source, changes):
    root, _ = place
    config = replace(CONFIG, model=replace(CONFIG.model, **changes))
    begin = root / "first" if source == "first" else maesil.load_encoder(root / "encoder")
    with pytest.raises(CheckpointError, match=r"--init-from: the weights of .* do not fit"):
        told(root / "store", config, tmp_path / "r", init_from=begin)
    assert not (tmp_path / "r" / "checkpoint.pt").exists()
