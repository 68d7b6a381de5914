"""``maesil train`` as a user types it: what it begins with, how it goes on, what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.command_line import fails, run
from support.stores import make_store

from maesil.errors import EXIT_USAGE
from maesil.store.store import Store
from maesil.training.checkpoint import load_run
from maesil.training.choose import starting_point
from maesil.training.log import RunLog

pytestmark = pytest.mark.usefixtures("one_thread", "plain_runs")
SMALL = [
    "--device", "cpu", "--batch", "2", "--set", "train.threads=1", "--set", "train.validation_crops=2",
    *(word for name in ("width", "decoder_width") for word in ("--set", f"model.{name}=16")),
    "--set", "model.crop=16", "--set", "model.depth=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("train") / "s.zarr", [(32, 40, 36), (40, 32, 33)], superpatch=32).path


def test_without_a_preset_a_cpu_gets_tiny_and_hears_why_and_how_long(store, tmp_path):
    code, out, err = run("train", f"{store}=0.5", "--out", tmp_path / "r", *SMALL, "--steps", 2)
    assert code == 0
    assert "preset tiny, since training is on a CPU; --preset takes another one" in err
    assert "2 steps of 2 crops: " in err and "or more, at that peak" in err
    assert "2 steps in" in out and out.endswith(f"next: maesil evaluate {tmp_path / 'r'} {store}\n")
    assert "nan" not in err


def test_a_gpu_s_preset_follows_the_store(tmp_path):
    large, small = (make_store(tmp_path / str(edge), [(40, 40, 40)], superpatch=edge).path for edge in (128, 64))
    gpu = torch.device("cuda")
    chosen, why = starting_point([large], tmp_path / "r", gpu, resume=False)
    assert (chosen.model.width, why.split(",")[0]) == (384, "preset small") and "1 volume (base" in why
    chosen, why = starting_point([small], tmp_path / "r", gpu, resume=False)
    assert chosen.model.crop == 64 and "an edge of 64" in why
    assert Store.open(large).superpatch % starting_point([large], tmp_path / "r", gpu, resume=False)[0].model.crop == 0


def test_one_command_begins_and_goes_on_with_its_own_configuration(store, tmp_path):
    out = tmp_path / "r"
    assert "nothing to resume" in fails(EXIT_USAGE, "train", store, "--out", out, *SMALL, "--resume")
    command = ("train", store, "--resume", "auto", "--out", out)
    assert run(*command, *SMALL, "--steps", 2, "--set", "train.lr=1e-3")[0] == 0
    code, said, err = run(*command, "--steps", 4)
    assert code == 0 and "2 steps in" in said and "4 in all" in said
    assert f"the configuration is that of {out}" in err
    config = load_run(out).config
    assert (config.train.lr, config.model.width, config.train.steps) == (1e-3, 16, 4)
    code, said, _ = run("train", store, "--out", out, "--resume")
    assert code == 0 and "4 steps done before, nothing was left to do" in said
    assert "--resume: expected nothing more, or auto" in fails(EXIT_USAGE, "train", store, "--out", out, "--resume=yes")
    assert "holds a run already" in fails(EXIT_USAGE, "train", store, "--out", out, *SMALL)


def test_a_start_that_was_killed_before_its_checkpoint_keeps_its_options(store, tmp_path, monkeypatch):
    out = tmp_path / "r"
    command = ("train", store, "--resume", "auto", "--out", out)

    def kill(*_, **__):
        raise GeneratorExit  # no Exception: nothing catches it

    with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
        patch.setattr("maesil.training.trainer.save_checkpoint", kill)
        run(*command, *SMALL, "--steps", 2)
    line = fails(EXIT_USAGE, *command, "--set", "train.seed=4")
    assert "before its first checkpoint, with train.seed=0, now 4;" in line
    assert "model.width=16, now 128" in fails(EXIT_USAGE, *command, "--preset", "tiny", "--set", "model.crop=16")
    code, said, err = run(*command)
    assert code == 0 and "2 steps in" in said
    assert f"the configuration is that of {out}" in err and "it begins again as it was" in err


def test_minutes_and_steps_exclude_each_other(store, tmp_path):
    line = fails(EXIT_USAGE, "train", store, "--out", tmp_path / "r", *SMALL, "--steps", 2, "--set", "train.minutes=1")
    assert "expected one of the two" in line


def test_with_nobody_held_out_no_evaluation_is_recommended(tmp_path):
    store = make_store(tmp_path / "s", [(32, 32, 32)]).path
    code, out, _ = run("train", store, "--out", tmp_path / "r", *SMALL, "--steps", 1)
    assert code == 0 and "next: maesil export" in out and "evaluate on a store of other patients" in out


def test_an_exported_encoder_begins_a_run(store, tmp_path):
    assert run("train", store, "--out", tmp_path / "a", *SMALL, "--steps", 1)[0] == 0
    assert run("export", tmp_path / "a", "--out", tmp_path / "e")[0] == 0
    for source in ("a", "e"):
        out = tmp_path / f"from_{source}"
        code, _, err = run("train", store, "--out", out, *SMALL, "--steps", 1, "--init-from", tmp_path / source)
        assert code == 0 and "the first weights are those of" in err


def started(store: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    """The command in a process of its own, to be used in ``with``: a test that fails leaves none behind."""
    words = (sys.executable, "-m", "maesil", "train", store, "--out", out, *SMALL, *more)
    return subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)


def test_a_reader_that_leaves_ends_nothing(store, tmp_path):
    long = tmp_path / ("a long name of a folder " * 6) / "r"
    with started(store, long, "--steps", 1) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.stderr.close()
        assert process.wait(240) == 0
    assert first.startswith("1 patient to train on, 1 held out")
    assert load_run(long).step == 1


def test_lines_in_a_file_are_whole(store, tmp_path):
    _, _, err = run("train", store, "--out", tmp_path / "r", *SMALL, "--steps", 1)
    assert [line for line in err.splitlines() if "1 patient to train on" in line and "step 0 of 1" in line]


@pytest.mark.slow
def test_a_process_that_is_asked_to_end_leaves_a_checkpoint(store, tmp_path):
    out = tmp_path / "r"
    with started(store, out, "--steps", 100_000) as process:
        try:
            while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err.count("interrupted") == 1 and "the checkpoint is written, go on with --resume" in err
    assert load_run(out).step >= 1
    assert not list(out.glob("*partial*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name)
def test_what_a_batch_system_sends_ends_it_resumably_with_one_line(store, tmp_path, monkeypatch, number):
    show = RunLog.show

    def send(log, step, loss):
        show(log, step, loss)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(RunLog, "show", send)
    before = signal.signal(number, signal.SIG_DFL)  # a shell may have had it ignored
    try:
        code, _, err = run("train", store, "--out", tmp_path / "r", *SMALL, "--steps", 3)
    finally:
        signal.signal(number, before)
    assert code == 130
    assert err.count("interrupted") == 1 and "the checkpoint is written, go on with --resume" in err
    assert load_run(tmp_path / "r").step == 1
    assert not list((tmp_path / "r").glob("*partial*"))
