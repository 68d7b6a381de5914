from __future__ import annotations

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch

from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.data.split import Split
from maesil.errors import CheckpointError, ResourceError
from maesil.models.masked_autoencoder import MaskedAutoencoder
from maesil.training.checkpoint import CHECKPOINT, content_sha256, load_run, restore_rng, save_checkpoint
from maesil.training.optim import make_optimizer
from maesil.types import Intensity

CONFIG = RunConfig(
    ModelConfig(crop=32, width=8, depth=1, decoder_width=8, decoder_depth=1), train=TrainConfig(steps=10)
)
INTENSITY = Intensity(window=(-175.0, 250.0), mean=0.123456789, std=0.25)
SPLIT = Split(train=("p1", "p2"), validation=("p3",))


def save(folder, config=CONFIG, **changes):
    model = MaskedAutoencoder(config.model)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = {
        "model": model, "optimizer": optimizer, "step": 3, "intensity": INTENSITY, "config": config,
        "split": SPLIT, "store_fingerprints": ("abc", "def"),
    }  # fmt: skip
    save_checkpoint(folder, **(values | changes))
    return model, optimizer


def test_everything_comes_back_exactly(tmp_path):
    torch.manual_seed(5)
    model, optimizer = save(tmp_path)
    expected = torch.rand(4)
    run = load_run(tmp_path)
    assert (run.config, run.intensity, run.split, run.step) == (CONFIG, INTENSITY, SPLIT, 3)
    assert run.store_fingerprints == ("abc", "def")
    assert run.torch_version == torch.__version__
    for name, value in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value)
    again = make_optimizer(run.model, CONFIG.train)
    again.load_state_dict(run.optimizer_state)
    for mine, theirs in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    restore_rng(run.rng_state, torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="No space left"):
        patch.setattr("os.fsync", full_disk)
        save(tmp_path, step=4)
    assert load_run(tmp_path).step == 3
    save(tmp_path, step=5)
    assert load_run(tmp_path).step == 5
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_disk_that_fills_up_while_torch_writes_leaves_the_old_checkpoint(tmp_path):
    """By the limit of a file's size: the system refuses to write on, as on a full disk."""
    save(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / CHECKPOINT).stat().st_size // 2, hard))
    try:
        with pytest.raises(ResourceError, match=r"could not be written \(File too large\)"):
            save(tmp_path, step=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_run(tmp_path).step == 3
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_what_is_no_checkpoint_ends_in_one_clear_line(tmp_path):
    path = tmp_path / CHECKPOINT
    with pytest.raises(CheckpointError, match="expected a run folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"found no checkpoint\.pt"):
        load_run(tmp_path)
    save(tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged, cut short") as error:
            load_run(tmp_path)
        assert "\n" not in str(error.value)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="another program"):
        load_run(tmp_path)
    torch.save({"format": "maesil-checkpoint", "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 2 or 3, found 99"):
        load_run(tmp_path)
    torch.save({"format": "maesil-checkpoint", "version": 3}, path)
    with pytest.raises(CheckpointError, match="checksum"):
        load_run(tmp_path)
    empty = {"format": "maesil-checkpoint", "version": 3}
    torch.save({**empty, "sha256": content_sha256(empty)}, path)
    with pytest.raises(CheckpointError, match="incomplete"):
        load_run(tmp_path)


def test_no_flipped_bit_passes(tmp_path):
    """Wherever it is, the checkpoint is refused, or all that is read is as it was written."""
    save(tmp_path)
    path, written = tmp_path / CHECKPOINT, load_run(tmp_path)
    whole = path.read_bytes()
    weights = written.last_weights["patch_embed.weight"].numpy().tobytes()
    refused = 0
    places = [whole.index(weights) + 17, *np.random.default_rng(0).integers(len(whole), size=60)]
    for place in map(int, places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = load_run(tmp_path)
        except CheckpointError:
            refused += 1
            continue
        assert place != places[0], "a weight was altered"
        assert (found.config, found.split, found.step, found.intensity) == (CONFIG, SPLIT, 3, INTENSITY)
        for name in ("last_weights", "optimizer_state", "rng_state"):
            assert content_sha256(getattr(found, name)) == content_sha256(getattr(written, name))
    assert refused > 10


def test_the_hash_of_content_sees_every_change_and_no_container(tmp_path):
    value = {"a": torch.arange(6.0).reshape(2, 3), "b": [1, 2.5, None, "x"], "c": {0: torch.tensor(True)}}
    torch.save(value, tmp_path / "v")
    assert content_sha256(torch.load(tmp_path / "v")) == content_sha256(value)
    others = [
        {**value, "a": torch.arange(6.0).reshape(3, 2)}, {**value, "a": torch.arange(6).reshape(2, 3)},
        {**value, "b": [1, 2.5, None, "y"]}, {**value, "c": {1: torch.tensor(True)}}, {**value, "d": 0},
        {**value, "c": {0: torch.tensor(False)}},
    ]  # fmt: skip
    hashes = {content_sha256(one) for one in (value, *others)}
    assert len(hashes) == 1 + len(others)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"format": "maesil-checkpoint", "version": 3, "model": Evil()}, tmp_path / CHECKPOINT)
    with pytest.raises(CheckpointError):
        load_run(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    wider = replace(CONFIG, model=replace(CONFIG.model, width=16))
    save(tmp_path, model=MaskedAutoencoder(wider.model))
    with pytest.raises(CheckpointError, match="do not have the shapes") as error:
        load_run(tmp_path)
    assert "\n" not in str(error.value)
