from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.stores import add_volume, make_store, synthetic_hu
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.checkpoint import checkpoint

from maesil import kernels
from maesil.config.schema import KERNELS, ModelConfig, RunConfig, TrainConfig
from maesil.config.toml import from_document
from maesil.devices import pick_device
from maesil.errors import CheckpointError, MaesilError, ResourceError, StoreError, UsageError
from maesil.models import masked_autoencoder
from maesil.signals import ENDS, interrupts_deferred
from maesil.store.store import Store
from maesil.training.checkpoint import CHECKPOINT, load_run
from maesil.training.log import RunLog, read_metrics, truncate_metrics
from maesil.training.train import train

CONFIG = RunConfig(
    ModelConfig(crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1),
    train=TrainConfig(
        steps=8, batch=2, checkpoint_every=3, validate_every=4, validation_crops=3, device="cpu", threads=1
    ),
)


def with_train(**changes):
    return replace(CONFIG, train=replace(CONFIG.train, **changes))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    make_store(path, [(32, 40, 36), (40, 32, 33), (32, 32, 48)], superpatch=32)
    return path


def run(store, out, config=CONFIG, **options):
    console = Console(file=io.StringIO(), width=200)
    summary = train([store], config, out, console=console, **options)
    return summary, console.file.getvalue()


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return out, *run(store, out)


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


KILLED = """
import io, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from rich.console import Console
import test_train
from maesil.training.train import train

train([Path(sys.argv[2])], test_train.with_train(steps=400, checkpoint_every=7), Path(sys.argv[3]),
      resume=sys.argv[4] == "resume", console=Console(file=io.StringIO()))
"""


def start(store, out, resume):
    here, tests = Path(__file__).parent, Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))}
    command = [sys.executable, "-c", KILLED, here, store, out, "resume" if resume else "anew"]
    return subprocess.Popen([str(word) for word in command], env=environment)


def wait_for_lines(out, count, process):
    path = out / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.002)


def test_killed_twice_and_resumed_the_losses_are_those_of_an_undisturbed_run(store, tmp_path):
    out = tmp_path / "killed"
    for resume, lines in ((False, 12), (True, 25)):
        process = start(store, out, resume)
        wait_for_lines(out, lines, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    step = load_run(out).step
    assert step % 7 == 0
    assert metrics(out)[-1]["step"] >= step
    last = step + 10
    # The cosine depends on the number of steps, so the undisturbed run is told the same and stopped there.
    config = with_train(steps=400, checkpoint_every=7)
    expected = first_losses(store, tmp_path / "undisturbed", config, last)
    assert first_losses(store, out, config, last, resume=True) == expected


def first_losses(store, out, config, count, resume=False):
    trainer_step = threading.Event()

    def stop_at(step):
        if step >= count:
            os.kill(os.getpid(), signal.SIGINT)
            trainer_step.set()

    with pytest.MonkeyPatch.context() as patch:
        show = RunLog.show
        patch.setattr(RunLog, "show", lambda self, step, loss: (show(self, step, loss), stop_at(step)))
        with pytest.raises(KeyboardInterrupt):
            run(store, out, config, resume=resume)
    assert trainer_step.is_set()
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(1, count + 1))
    return [(record["loss"], record["grad_norm"], record.get("validation_loss")) for record in records]


def test_an_interrupt_writes_the_checkpoint_of_its_step(store, tmp_path):
    first_losses(store, tmp_path / "r", with_train(checkpoint_every=1000), 5)
    assert load_run(tmp_path / "r").step == 5


def test_a_run_that_lost_its_checkpoint_is_refused_and_keeps_its_log(undisturbed, store, tmp_path):
    out, _, _ = undisturbed
    lost = shutil.copytree(out, tmp_path / "lost")
    (lost / CHECKPOINT).unlink()
    for resume in (True, False, "auto"):
        with pytest.raises(CheckpointError, match="expected the checkpoint beside the metrics"):
            run(store, lost, resume=resume)
    assert metrics(lost) == metrics(out)


def test_resume_auto_begins_and_goes_on_by_one_command(undisturbed, store, tmp_path):
    out, _, _ = undisturbed
    with pytest.raises(CheckpointError, match="--resume auto begins"):
        run(store, tmp_path / "r", resume=True)
    (tmp_path / "r").mkdir(exist_ok=True)
    (tmp_path / "r" / "config.toml").write_text("half of a beginn", encoding="utf-8")  # killed before step 0 was kept
    first_losses(store, tmp_path / "r", CONFIG, 5, resume="auto")
    run(store, tmp_path / "r", resume="auto")
    assert [r["loss"] for r in metrics(tmp_path / "r")] == [r["loss"] for r in metrics(out)]


def test_a_complete_run_stays_as_it_is_and_says_so(undisturbed, store, tmp_path):
    done = shutil.copytree(undisturbed[0], tmp_path / "done")
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    summary, _ = run(store, done, resume=True)
    assert (summary.last, summary.steps, summary.begun_at) == ({}, 8, 8)
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before
    with pytest.raises(CheckpointError, match=r"8 steps done, asked for is train\.steps=5"):
        run(store, done, with_train(steps=5), resume=True)


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


def test_a_run_cut_off_before_step_1_goes_on(undisturbed, store, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match="go on with --resume"):
        patch.setattr("maesil.training.train.measure_pace", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        run(store, tmp_path / "r")
    assert load_run(tmp_path / "r").step == 0
    run(store, tmp_path / "r", resume=True)
    assert [r["loss"] for r in metrics(tmp_path / "r")] == [r["loss"] for r in metrics(undisturbed[0])]


def test_two_runs_do_not_share_a_folder_nor_a_run_a_store(store, tmp_path):
    process = start(store, tmp_path / "r", resume=False)
    try:
        wait_for_lines(tmp_path / "r", 3, process)
        for resume in (False, True, "auto"):
            with pytest.raises(UsageError, match="another `maesil train` is writing there"):
                run(store, tmp_path / "r", resume=resume)
    finally:
        process.kill()
        process.wait()
    run(store, tmp_path / "r", with_train(steps=400, checkpoint_every=7, threads=0), resume=True)
    assert load_run(tmp_path / "r").step == 400
    before = sorted(store.rglob("*"))
    for place in (store, store / "run", store / "volumes" / "run"):
        with pytest.raises(UsageError, match="in the store"):
            run(store, place)
    assert sorted(store.rglob("*")) == before


def test_runs_are_neither_overwritten_nor_resumed_by_mistake(undisturbed, store, tmp_path):
    out, _, _ = undisturbed
    with pytest.raises(UsageError, match="--resume, or name another --out"):
        run(store, out)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run(store, tmp_path / "nowhere", resume=True)
    with pytest.raises(CheckpointError, match=r"model\.width=16, asked for is 32"):
        run(store, out, replace(CONFIG, model=replace(CONFIG.model, width=32)), resume=True)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match="found: a file"):
        run(store, tmp_path / "file")


def test_stores_that_grew_are_trained_on_as_they_were(tmp_path):
    """Two stores, whose order by fingerprint changes as they grow: the losses stay those of an undisturbed run."""
    shapes = {"a": [(32, 32, 32), (32, 40, 32)], "b": [(40, 32, 32), (32, 32, 48)]}
    stores = [make_store(tmp_path / name, some, superpatch=32) for name, some in shapes.items()]
    paths, orders = [store.path for store in stores], set()
    console = Console(file=io.StringIO(), width=300)
    train(paths, CONFIG, tmp_path / "began", console=console)
    undisturbed = shutil.copytree(tmp_path / "began", tmp_path / "undisturbed")
    train(paths, with_train(steps=12), undisturbed, console=console, resume=True)
    expected = [record["loss"] for record in metrics(undisturbed)]
    for number in range(4):
        add_volume(stores[number % 2], synthetic_hu((32, 32, 32), 9 + number), name=f"later{number}")
        orders.add(stores[0].fingerprint < stores[1].fingerprint)
        grown = shutil.copytree(tmp_path / "began", tmp_path / f"grown{number}")
        train(paths, with_train(steps=12), grown, console=console, resume=True)
        assert [record["loss"] for record in metrics(grown)] == expected
    assert len(orders) == 2, "the order never changed: this test shows less than it says"
    assert "the stores have grown by 4 volumes: training goes on with those it began with" in console.file.getvalue()


def test_a_store_that_lost_what_the_run_began_with_is_refused(tmp_path):
    store = make_store(tmp_path / "s", [(32, 32, 32), (32, 32, 40)])
    run(store.path, tmp_path / "r")
    shutil.rmtree(next((store.path / "commits").glob("*/*")))
    with pytest.raises(CheckpointError, match=r"stores changed since the checkpoint \(.*s: 1 volume removed\)"):
        run(store.path, tmp_path / "r", with_train(steps=20), resume=True)


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


def test_damage_met_on_the_way_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    store = make_store(tmp_path / "s", [(32, 32, 32), (32, 32, 32)])
    run(store.path, tmp_path / "r")
    (group,) = load_run(tmp_path / "r").split.train
    (shard,) = store.path.glob(f"volumes/*/{group}/*/0/c/0/0/0")
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(StoreError, match=group):
        run(store.path, tmp_path / "r", with_train(steps=20), resume=True)
    assert load_run(tmp_path / "r").step == 8


def test_training_learns(store, tmp_path):
    config = with_train(steps=120, batch=4, lr=3e-3, flips="", validate_every=1000)
    config = replace(config, model=replace(config.model, crop=32, width=32, decoder_width=32))
    run(store, tmp_path / "r", config)
    losses = [record["loss"] for record in metrics(tmp_path / "r")]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_metrics_are_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 3)
    assert not path.exists()
    path.write_bytes(b'{"step": 2, "loss": 1}\n{"step": 3}\n{"step": 3, "\xff": 1}\n{"step": 4}\n{"step": 1')
    assert [record["step"] for record in read_metrics(path)] == [2, 3, 4]
    truncate_metrics(path, 3)
    assert path.read_text(encoding="utf-8") == '{"step": 2, "loss": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("number", ENDS)
def test_the_first_signal_waits_and_the_second_interrupts(number):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_deferred() as interrupted:
        os.kill(os.getpid(), number)
        assert interrupted.wait(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        pytest.fail("the second signal did not interrupt")
    assert signal.getsignal(signal.SIGINT) is before


def test_devices_that_are_not_there_are_refused():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="CUDA devices"):
        pick_device("cuda:99")
    for name in ("abacus", "cuda:", "mps", "", "cuda:-1"):
        with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
            pick_device(name)


@pytest.mark.parametrize("kind", ["vae", "vqvae", "mae2d", "primus"])
def test_every_kind_of_model_resumes_to_the_bit_with_its_average(store, tmp_path, kind):
    """A VAE draws numbers in every step, a VQ-VAE keeps a codebook; the moving average is state as well."""
    config = with_train(ema=0.9, window_jitter=0.1, steps=8)
    width = 18 if kind == "primus" else 16
    config = replace(config, model=replace(CONFIG.model, kind=kind, width=width, channels=4, latent=4, codes=6))
    run(store, tmp_path / "whole", config)
    first_losses(store, tmp_path / "cut", config, 5)
    run(store, tmp_path / "cut", config, resume=True)
    whole, cut = (metrics(tmp_path / name) for name in ("whole", "cut"))
    timing = {"seconds", "crops_per_s", "share_of_peak", "data_wait_share"}
    assert [{k: v for k, v in r.items() if k not in timing} for r in whole] == [
        {k: v for k, v in r.items() if k not in timing} for r in cut
    ]
    a, b = load_run(tmp_path / "whole"), load_run(tmp_path / "cut")
    for name, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[name])
        assert torch.equal(a.last_weights[name], b.last_weights[name])


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
    config = with_train(minutes=0.02)
    summary, _ = run(store, tmp_path / "r", config)
    saved = load_run(tmp_path / "r")
    assert saved.config.train.steps == summary.steps == metrics(tmp_path / "r")[-1]["step"]
    again, _ = run(store, tmp_path / "r", config, resume=True)
    assert again.steps == summary.steps and again.last == {}
    # The rehearsal leaves no trace: the same steps without it give the same losses.
    run(store, tmp_path / "fixed", with_train(steps=summary.steps))
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("r", "fixed")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("decoder", ["subset", "cross"])
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


@pytest.mark.parametrize("offsets", ["across", "inside"])
def test_the_tiers_take_the_same_steps_and_may_change_on_resume(store, tmp_path, offsets):
    """Superpatches from disk, from memory (decoded, encoded), scans on the device: losses equal to the bit."""
    tiers = {"disk": {}, "ram": {"ram": "auto"}, "little ram": {"ram": "0.0003GB"}, "device": {"device_resident": True}}
    losses = {}
    for name, changes in tiers.items():
        run(store, tmp_path / name, with_train(offsets=offsets, flips="zyx", window_jitter=0.1, **changes))
        losses[name] = [(r["loss"], r["grad_norm"], r.get("validation_loss")) for r in metrics(tmp_path / name)]
    assert losses["disk"] == losses["ram"] == losses["little ram"] == losses["device"]
    changed = with_train(offsets=offsets, flips="zyx", window_jitter=0.1, device_resident=True, steps=10)
    run(store, tmp_path / "disk", changed, resume=True)
    assert metrics(tmp_path / "disk")[-1]["step"] == 10


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
