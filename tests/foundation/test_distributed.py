"""Two real processes, started by torchrun, against one: same losses, one writer, one end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.stores import make_store

from maesil import distributed as ranks
from maesil.errors import EndedWithOthers, MaesilError, ResourceError, StoreError, UsageError
from maesil.store.store import Store
from maesil.training.checkpoint import load_run

pytestmark = pytest.mark.slow
TINY = [
    "--set", "model.crop=16", "--set", "model.width=16", "--set", "model.depth=1", "--set", "model.decoder_width=16",
    "--set", "model.channels=4", "--set", "model.latent=4", "--set", "model.codes=6", "--set", "train.ema=0.9",
    "--set", "train.threads=1", "--set", "train.validate_every=3", "--set", "train.checkpoint_every=1000",
    "--set", "train.window_jitter=0.05", "--set", "train.optimizer=adamw", "--set", "train.lr=5e-3",
    "--preset", "tiny", "--device", "cpu", "--batch", "4",
]  # fmt: skip
TOLERANCE = {"rel": 1e-5}
"""Sums over ranks and parts are rounded in another order; over few steps no more comes of it.

With AdamW, that is: Muon makes matrices orthogonal in bfloat16, and tells apart what differs in the last digit.
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    # Volumes that fill their superpatches unevenly: crops weigh differently, so a mean of means would show.
    make_store(path, [(32, 40, 36), (40, 32, 33), (32, 32, 48)], superpatch=32)
    return path


def command(store, out, *options, ranks):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "maesil", "train", str(store), "--out", str(out), *TINY, *options]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def train(store, out, *options, ranks):
    words = command(store, out, *options, ranks=ranks)
    return subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def same_steps(out, other):
    names = ("loss", "grad_norm", "picture_grad_norm", "lr", "kl", "perplexity", "validation_loss", "validation_psnr")
    for ours, theirs in zip(records(out), records(other), strict=True):
        assert ours["step"] == theirs["step"]
        for name in names:
            assert ours.get(name) == (pytest.approx(theirs[name], **TOLERANCE) if name in theirs else None), name


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    done = train(store, out, "--steps", "6", ranks=1)
    assert done.returncode == 0, done.stderr
    return out


def test_two_ranks_take_the_steps_of_one_process_and_speak_once(store, alone, tmp_path):
    """The picture head sees the same crops, and the covariances of the latent are those of both ranks' crops."""
    out = tmp_path / "run"
    done = train(store, out, "--steps", "6", ranks=2)
    assert done.returncode == 0, done.stderr
    same_steps(out, alone)
    ours, theirs = load_run(out), load_run(alone)
    assert ours.ranks == 2 and theirs.ranks == 1
    for name, value in theirs.model.state_dict().items():
        # The biases of keys have no gradient but rounding, which AdamW scales up: hence the absolute part.
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-3, atol=1e-3)
    assert done.stdout.count("next: maesil evaluate") == 1
    told = " ".join(done.stderr.split())
    assert told.count("patients to train on") == 1 and "by 2 ranks" in told


def test_two_ranks_in_two_parts_each_take_the_steps_of_one_process(store, tmp_path):
    """Without the loss on the latent's covariances, which are those of a micro-batch."""
    plain = ("--steps", "4", "--set", "model.decorrelation=0")
    for name, options, count in (("one", (), 1), ("parts", ("--set", "train.accumulate=2"), 2)):
        done = train(store, tmp_path / name, *plain, *options, ranks=count)
        assert done.returncode == 0, done.stderr
    same_steps(tmp_path / "parts", tmp_path / "one")


@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_noise_and_codebook_are_those_of_one_process(store, tmp_path, kind):
    for name, count in (("one", 1), ("two", 2)):
        done = train(store, tmp_path / name, "--steps", "4", "--set", f"model.kind={kind}", ranks=count)
        assert done.returncode == 0, done.stderr
    same_steps(tmp_path / "two", tmp_path / "one")


def test_interrupted_on_two_ranks_it_goes_on_alone_and_says_what_changes(store, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    started = subprocess.Popen(
        command(store, out, "--steps", "4000", ranks=2), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(out, 8, started)
    started.send_signal(signal.SIGTERM)
    _, told = started.communicate(timeout=60)
    assert started.returncode != 0
    assert told.count("the checkpoint is written, go on with --resume") == 1
    step = load_run(out).step
    assert records(out)[-1]["step"] == step >= 8

    more = ["--steps", "4000", "--set", "train.minutes=0"]
    resumed = stopped_after(step + 4, store, out, "--resume", *more)
    assert "steps were taken by 2 ranks in 1 part each, now by 1 rank in 1 part each" in resumed
    stopped_after(step + 4, store, undisturbed, *more)
    ours, theirs = (records(run)[: step + 4] for run in (out, undisturbed))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=2e-3)


def stopped_after(step, store, out, *options):
    started = subprocess.Popen(
        command(store, out, *options, ranks=1), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(out, step, started)
    started.send_signal(signal.SIGINT)
    _, told = started.communicate(timeout=60)
    assert started.returncode == 130
    return told


def wait_for_steps(out, count, process):
    path = out / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_a_killed_rank_ends_the_run_with_its_reason_in_bounded_time(store, tmp_path):
    out = tmp_path / "run"
    started = subprocess.Popen(
        command(store, out, "--steps", "100000", ranks=2), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(out, 5, started)
    os.kill(rank_process(started.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    _, told = started.communicate(timeout=60)
    assert started.returncode != 0
    assert time.monotonic() - killed < 45
    assert told.count("error: another rank ended without a word") == 1
    assert "go on from its last checkpoint with --resume" in told


def rank_process(launcher, rank):
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status, environment = (process / "status").read_text(), (process / "environ").read_bytes()
        except OSError:
            continue
        if f"PPid:\t{launcher}\n" in status and f"\0RANK={rank}\0".encode() in environment:
            return int(process.name)
    raise AssertionError("no such rank")


def test_what_one_rank_meets_is_told_once_and_what_all_meet_as_well(store, alone, tmp_path):
    done = train(store, alone, ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("holds a run already") == 1
    done = train(store, tmp_path / "odd", "--batch", "3", ranks=2)
    assert done.stderr.count("expected a multiple of 2, for 2 ranks with train.accumulate=1") == 1
    # Damage met by whichever rank draws from it first, after the intensities were measured.
    damaged = make_store(tmp_path / "s", [(32, 32, 32), (32, 32, 32), (32, 32, 32)]).path
    started = subprocess.Popen(
        command(damaged, tmp_path / "r", "--steps", "100000", ranks=2), env=ENVIRONMENT, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_for_steps(tmp_path / "r", 2, started)
    for volume in Store.open(damaged).volumes():
        shard = damaged / volume.prefix / "0/c/0/0/0"
        shard.chmod(0o644)
        shard.write_bytes(shard.read_bytes()[:1000])
    _, told = started.communicate(timeout=60)
    assert started.returncode != 0
    assert told.count("error: ") - told.count("error: another rank") in (1, 2)
    assert "maesil/training/" not in told  # no traceback of ours, whatever torchrun prints


def test_alone_everything_is_answered_at_once(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks.joined() as us, ranks.joined() as again:
        assert us is again is ranks.current() is ranks.ALONE
        value = torch.arange(3)
        assert us.sum(value) is value and us.gather(1) == [1] and us.from_first(lambda: 2) == 2
        assert us.any(True) and not us.any(False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"WORLD_SIZE=2: expected the environment that torchrun sets"), ranks.joined():
        pass


def test_the_first_to_fail_tells_and_the_others_follow_silently():
    store = torch.distributed.HashStore()
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:541] Connection closed by peer [127.0.0.1]:1")
    first, second = ranks.Ranks(1, 3), ranks.Ranks(0, 3)
    told = ranks._told_once(StoreError("volume x: damaged"), first, store)
    assert isinstance(told, StoreError) and str(told) == "rank 1: volume x: damaged"
    follower = ranks._told_once(lost, second, store)
    assert isinstance(follower, EndedWithOthers) and follower.exit_code == 5
    same = ranks._told_once(StoreError("volume x: damaged"), second, store)
    assert isinstance(same, EndedWithOthers) and same.exit_code == 4
    other = ranks._told_once(MaesilError("step 3: loss nan"), second, store)
    assert str(other) == "step 3: loss nan"
    alone = ranks._told_once(lost, second, torch.distributed.HashStore())
    assert isinstance(alone, ResourceError) and "another rank ended" in str(alone)
    bug = ZeroDivisionError()
    assert ranks._told_once(bug, second, store) is bug
