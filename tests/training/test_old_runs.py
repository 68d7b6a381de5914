"""A run of checkpoint version 2, as maesil wrote it before there was a picture head, is read as what it was."""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from maesil.config.schema import ModelConfig
from maesil.config.toml import load_config
from maesil.errors import CheckpointError
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.training.checkpoint import load_run
from maesil.training.log import METRICS, read_metrics
from maesil.training.optim import make_optimizer

ARCHIVE = Path(__file__).parents[1] / "archive" / "run-2.tar.gz"


@pytest.fixture
def run_dir(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_its_model_is_the_one_that_was_trained_and_predicts_the_same(run_dir):
    run = load_run(run_dir)
    assert (run.step, run.split.train, run.config.train.optimizer) == (2, ("a",), "adamw")
    assert run.config.model == ModelConfig(
        crop=16, patch=4, width=16, depth=1, decoder_width=16, decoder_depth=1, head="refine", picture_head="none",
        decorrelation=0.0,
    )  # fmt: skip
    kept = torch.load(run_dir / "expected.pt", weights_only=True)
    masks = make_masks(run.config.mask, run.config.model.grid, [1, 2])
    with torch.no_grad():
        shown = run.model.eval()(MaskedInput(kept["volume"], masks, run.intensity, 4)).shown
    torch.testing.assert_close(shown, kept["predicted"], atol=1e-5, rtol=1e-5)


def test_its_optimiser_goes_on(run_dir):
    run = load_run(run_dir)
    optimizer = make_optimizer(run.model, run.config.train)
    optimizer.load_state_dict(run.optimizer_state)
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_its_configuration_is_read_from_its_file(run_dir):
    assert load_config("tiny", run_dir / "config.toml").model.head == "refine"


def test_metrics_are_read_under_the_names_of_today(tmp_path):
    written = [{"step": step, "loss": 1 / step, "superpatches_per_s": 9.5} for step in (1, 2)]
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in written), encoding="utf-8")
    assert read_metrics(tmp_path / METRICS) == [
        {"step": 1, "loss": 1, "crops_per_s": 9.5},
        {"step": 2, "loss": 0.5, "crops_per_s": 9.5},
    ]


def test_a_checkpoint_that_lost_its_checksum_is_not_taken_for_an_old_one(run_dir):
    path = run_dir / "checkpoint.pt"
    document = torch.load(path, weights_only=True)
    torch.save({**document, "version": 3}, path)
    with pytest.raises(CheckpointError, match="checksum"):
        load_run(run_dir)
    torch.save({**document, "version": 1}, path)
    with pytest.raises(CheckpointError, match="version 2 or 3, found 1"):
        load_run(run_dir)
