"""A run that was killed, interrupted or cut off goes on as if nothing had been; or is refused, where it must be."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.lanes import slow_but
from support.stores import add_volume, make_store, synthetic_hu
from support.training import CONFIG, metrics, run, with_train

from maesil.errors import CheckpointError, StoreError, UsageError
from maesil.signals import ENDS, interrupts_deferred
from maesil.training.checkpoint import CHECKPOINT, load_run
from maesil.training.log import RunLog, read_metrics, truncate_metrics
from maesil.training.train import train

KILLED = """
import io, sys
from pathlib import Path
from rich.console import Console
from support.training import with_train
from maesil.training.train import train

train([Path(sys.argv[1])], with_train(steps=400, checkpoint_every=7), Path(sys.argv[2]),
      resume=sys.argv[3] == "resume", console=Console(file=io.StringIO()))
"""


def start(store, out, resume):
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))}
    command = [sys.executable, "-c", KILLED, store, out, "resume" if resume else "anew"]
    return subprocess.Popen([str(word) for word in command], env=environment)


def wait_for_lines(out, count, process):
    path = out / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.002)


@pytest.mark.slow
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
    steps = load_run(tmp_path / "r").step + 3
    run(store, tmp_path / "r", with_train(steps=steps, checkpoint_every=7, threads=0), resume=True)
    assert load_run(tmp_path / "r").step == steps
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
    train(paths, with_train(steps=10), undisturbed, console=console, resume=True)
    expected = [record["loss"] for record in metrics(undisturbed)]
    for number in range(4):
        add_volume(stores[number % 2], synthetic_hu((32, 32, 32), 9 + number), name=f"later{number}")
        orders.add(stores[0].fingerprint < stores[1].fingerprint)
        grown = shutil.copytree(tmp_path / "began", tmp_path / f"grown{number}")
        train(paths, with_train(steps=10), grown, console=console, resume=True)
        assert [record["loss"] for record in metrics(grown)] == expected
    assert len(orders) == 2, "the order never changed: this test shows less than it says"
    assert "the stores have grown by 4 volumes: training goes on with those it began with" in console.file.getvalue()


def test_a_store_that_lost_what_the_run_began_with_is_refused(tmp_path):
    store = make_store(tmp_path / "s", [(32, 32, 32), (32, 32, 40)])
    run(store.path, tmp_path / "r")
    shutil.rmtree(next((store.path / "commits").glob("*/*")))
    with pytest.raises(CheckpointError, match=r"stores changed since the checkpoint \(.*s: 1 volume removed\)"):
        run(store.path, tmp_path / "r", with_train(steps=20), resume=True)


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


def test_metrics_are_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 3)
    assert not path.exists()
    path.write_bytes(b'{"step": 2, "loss": 1}\n{"step": 3}\n{"step": 3, "\xff": 1}\n{"step": 4}\n{"step": 1')
    assert [record["step"] for record in read_metrics(path)] == [2, 3, 4]
    truncate_metrics(path, 3)
    assert path.read_text(encoding="utf-8") == '{"step": 2, "loss": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("kind", slow_but(("vae", "vqvae", "mae2d", "primus"), ("vqvae",)))
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
