"""Training as a whole: what a run leaves, that it learns, and which ways of training take the same steps."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import replace

import pytest
import torch
from support.lanes import slow_but
from support.stores import make_store
from support.training import CONFIG, metrics, run, with_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.checkpoint import checkpoint

from maesil import kernels
from maesil.config.schema import KERNELS
from maesil.config.toml import from_document
from maesil.devices import pick_device
from maesil.errors import MaesilError, ResourceError, UsageError
from maesil.models import masked_autoencoder
from maesil.store.store import Store
from maesil.training.checkpoint import load_run
from maesil.training.log import RunLog


def test_a_run_leaves_what_it_promises(undisturbed, store):
    out, summary, printed = undisturbed
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert all({"loss", "lr", "grad_norm", "crops_per_s"} <= set(record) for record in records)
    assert [record["step"] for record in records if "validation_loss" in record] == [4, 8]
    assert summary.last == records[-1]
    assert summary.steps == 8
    split = json.loads((out / "split.json").read_text(encoding="utf-8"))
    assert (len(split["train"]), len(split["validation"])) == (2, 1)
    assert split["stores"] == [Store.open(store).fingerprint]
    assert from_document(tomllib.loads((out / "config.toml").read_text(encoding="utf-8"))) == CONFIG
    assert load_run(out).split.validation == tuple(split["validation"])
    (picture,) = (out / "pictures").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "2 patients to train on, 1 held out" in printed
    (last,) = [line for line in printed.splitlines() if line.startswith("step 8/8")]
    assert f"held out {records[-1]['validation_psnr']:.2f} dB" in last, "the score of another validation"


def test_tensorboard_holds_the_same_numbers(undisturbed):
    out, _, _ = undisturbed
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("loss", "lr", "validation_loss"):
        expected = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in metrics(out) if name in r]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


def test_validation_psnr_belongs_to_its_loss(undisturbed):
    out, _, _ = undisturbed
    last, std = metrics(out)[-1], load_run(out).intensity.std
    assert 10 ** (-last["validation_psnr_tokens"] / 10) == pytest.approx(last["validation_loss"] * std**2)


def test_the_same_run_again_is_the_same_to_the_bit(undisturbed, store, tmp_path):
    out, _, _ = undisturbed
    run(store, tmp_path / "again", with_train(readers=1))
    losses = [
        [(r["loss"], r["grad_norm"], r.get("validation_loss")) for r in metrics(o)] for o in (out, tmp_path / "again")
    ]
    assert losses[0] == losses[1]
    a, b = (load_run(o).model.state_dict() for o in (out, tmp_path / "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_where_memory_runs_out_activation_checkpointing_is_named_and_then_used(store, tmp_path, monkeypatch):
    def short_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(ResourceError, match=r"train\.activation_checkpointing=true"):
        patch.setattr("maesil.training.train.measure_pace", short_of_memory)
        run(store, tmp_path / "r")
    used = []
    monkeypatch.setattr(masked_autoencoder, "checkpoint", lambda *a, **k: (used.append(1), checkpoint(*a, **k))[1])
    run(store, tmp_path / "r", with_train(steps=2, activation_checkpointing=True), resume=True)
    blocks = CONFIG.model.depth + CONFIG.model.decoder_depth
    assert len(used) == 2 * blocks * CONFIG.train.accumulate


def test_one_patient_is_trained_on_and_nobody_is_held_out(tmp_path):
    store = make_store(tmp_path / "s", [(32, 32, 32)])
    summary, printed = run(store.path, tmp_path / "r")
    assert "validation_loss" not in summary.last
    assert "no validation" in printed


def test_a_loss_that_blows_up_names_step_and_crops_and_keeps_nothing(store, tmp_path):
    config = with_train(lr=1e30, warmup=0.0)
    with pytest.raises(MaesilError, match=r"step \d: loss .*volume [0-9a-f]{32}, crop at"):
        run(store, tmp_path / "r", config)
    assert load_run(tmp_path / "r").step == 0


def test_training_learns(store, tmp_path):
    config = with_train(steps=50, batch=4, lr=6e-3, flips="", validate_every=1000)
    config = replace(config, model=replace(config.model, crop=32, width=32, decoder_width=32))
    run(store, tmp_path / "r", config)
    losses = [record["loss"] for record in metrics(tmp_path / "r")]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_devices_that_are_not_there_are_refused():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="CUDA devices"):
        pick_device("cuda:99")
    for name in ("abacus", "cuda:", "mps", "", "cuda:-1"):
        with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
            pick_device(name)


def test_the_average_is_what_is_scored_and_differs_from_the_last_weights(store, tmp_path):
    run(store, tmp_path / "r", with_train(ema=0.9))
    saved = load_run(tmp_path / "r")
    moved = [
        name for name, value in saved.model.state_dict().items() if not torch.equal(value, saved.last_weights[name])
    ]
    assert len(moved) > 10
    run(store, tmp_path / "plain", with_train(ema=0.0))
    plain = load_run(tmp_path / "plain")
    assert all(torch.equal(value, plain.last_weights[name]) for name, value in plain.model.state_dict().items())
    # The average itself changes nothing in the training.
    assert all(torch.equal(value, plain.last_weights[name]) for name, value in saved.last_weights.items())


def test_a_budget_in_minutes_becomes_a_number_of_steps_and_stays(store, tmp_path):
    config = with_train(minutes=0.006)
    summary, _ = run(store, tmp_path / "r", config)
    saved = load_run(tmp_path / "r")
    assert saved.config.train.steps == summary.steps == metrics(tmp_path / "r")[-1]["step"]
    again, _ = run(store, tmp_path / "r", config, resume=True)
    assert again.steps == summary.steps and again.last == {}
    # The rehearsal leaves no trace: the same steps without it give the same losses.
    run(store, tmp_path / "fixed", with_train(steps=summary.steps))
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("r", "fixed")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("decoder", slow_but(("subset", "cross"), ("subset",)))
def test_lean_decoders_train(store, tmp_path, decoder):
    """On the held-out crops: those of two steps differ by more than a few steps teach."""
    config = replace(with_train(steps=40, validate_every=1), model=replace(CONFIG.model, crop=32, decoder=decoder))
    run(store, tmp_path / "r", config)
    losses = [record["validation_loss"] for record in metrics(tmp_path / "r")]
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_takes_the_same_steps(store, tmp_path):
    config = with_train(steps=3)
    run(store, tmp_path / "eager", config)
    run(store, tmp_path / "compiled", with_train(steps=3, compile=True))
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_kernels_are_those_asked_for_and_only_while_training(store, tmp_path):
    assert KERNELS == kernels.CHOICES
    with pytest.raises(UsageError, match=r"train\.kernels=triton: Triton needs a GPU, training is on cpu"):
        run(store, tmp_path / "r", with_train(kernels="triton"))
    with pytest.raises(UsageError, match="one of auto, reference, triton"):
        with_train(kernels="cuda")
    chosen = []
    with kernels.use_kernels("auto"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "show", lambda *_: chosen.append(kernels.library._choice))
        run(store, tmp_path / "r", with_train(kernels="reference", steps=1))
        assert kernels.library._choice == "auto"
    assert chosen == ["reference"]


@pytest.mark.parametrize("offsets", slow_but(("across", "inside"), ("inside",)))
def test_the_tiers_take_the_same_steps_and_may_change_on_resume(store, tmp_path, offsets):
    """Superpatches from disk, from memory (decoded, encoded), scans on the device: losses equal to the bit."""
    tiers = {"disk": {}, "ram": {"ram": "auto"}, "little ram": {"ram": "0.0003GB"}, "device": {"device_resident": True}}
    losses = {}
    for name, changes in tiers.items():
        run(store, tmp_path / name, with_train(offsets=offsets, flips="zyx", window_jitter=0.1, steps=5, **changes))
        losses[name] = [(r["loss"], r["grad_norm"], r.get("validation_loss")) for r in metrics(tmp_path / name)]
    assert losses["disk"] == losses["ram"] == losses["little ram"] == losses["device"]
    changed = with_train(offsets=offsets, flips="zyx", window_jitter=0.1, device_resident=True, steps=6)
    run(store, tmp_path / "disk", changed, resume=True)
    assert metrics(tmp_path / "disk")[-1]["step"] == 6


@pytest.mark.parametrize("kind", ["ae", "mae2d"])
def test_other_models_see_resident_scans_alike(store, tmp_path, kind):
    losses = []
    for resident in (False, True):
        config = with_train(steps=3, device_resident=resident)
        run(
            store,
            tmp_path / str(resident),
            replace(config, model=replace(CONFIG.model, kind=kind, channels=4, latent=4)),
        )
        losses.append([record["loss"] for record in metrics(tmp_path / str(resident))])
    assert losses[0] == losses[1]
