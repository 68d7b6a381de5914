from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import naive
import pytest
import torch
from rich.console import Console
from support.stores import make_store
from torch.nn import functional

from maesil import kernels
from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.models.registry import make_model
from maesil.training import throughput
from maesil.training.flops import count_flops
from maesil.training.learner import Learner, MicroBatch
from maesil.training.optim import make_optimizer
from maesil.training.throughput import Pace, duration_told, flops_per_crop, measure_peak
from maesil.training.train import train
from maesil.types import Intensity

ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(crop=16, width=16, depth=2, decoder_width=8, decoder_depth=1, head="linear", channels=4, latent=4)


def test_attention_is_counted_on_every_device_by_its_definition():
    query = torch.randn(1, 2, 64, 32, requires_grad=True)
    product = 2 * 2 * 64 * 64 * 32  # of one matrix product, two heads
    attend = functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(query, query, query)) == 2 * product
    assert count_flops(lambda: attend(query, query, query).sum().backward()) == 6 * product


def learner(kind):
    config = RunConfig(ModelConfig(**{**SMALL.__dict__, "kind": kind}))
    model = make_model(config.model)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = make_optimizer(model, config.train)
    return Learner(config=config, device=torch.device("cpu"), model=model, optimizer=optimizer)


def one_crop(config):
    volume = torch.zeros(1, 16, 16, 16, dtype=torch.int16)
    masks = make_masks(config.mask, config.model.grid, [0])
    weight = torch.ones(masks.ids_masked.shape)
    return MicroBatch(MaskedInput(volume, masks, Intensity(mean=0.5, std=0.2), 8), weight, weight)


def test_the_operations_of_a_step_are_those_counted_by_hand():
    ours = learner("maesil")
    part = one_crop(ours.config)
    N, L, D, E, V = part.inputs.masks.ids_keep.shape[1], 8, 16, 8, 512

    def block(tokens, width):
        return tokens * 24 * width**2 + 4 * tokens**2 * width  # q, k, v, proj, MLP; scores and mixing

    M = L - N
    forward = 2 * N * V * D + 2 * block(N, D) + 2 * N * D * E + block(L, E) + 2 * L * E * V
    in_decoder_alone = 2 * (L - M) * E * V  # the head sees the hidden tokens alone
    forward -= in_decoder_alone
    # Twice as much backward, but for the gradient by the voxels.
    alone = 3 * forward - 2 * N * V * D
    # The picture head draws every fourth crop: three MLPs of 16 hidden channels. No gradient goes to the tokens, nor
    # to the faces of the draft. In the end, faces are shared out over patches.
    F, H, every = 6 * 64, 16, ours.config.train.picture_head_every
    see, correct, share_out = 2 * M * (F + 12 + E) * H, 2 * M * H * V, 2 * M * F * V
    pictures = 3 * 3 * (see + correct) - see + 2 * share_out
    assert flops_per_crop(ours, part) == alone + pictures // every


@pytest.mark.parametrize("kind", ["maesil", "vqvae"])
def test_counting_leaves_model_and_numbers_drawn_as_they_were(kind):
    ours = learner(kind)
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    state = torch.get_rng_state()
    flops_per_crop(ours, one_crop(ours.config))
    measure_peak.cache_clear()
    assert 1e8 < measure_peak(torch.device("cpu"), 1) < 1e14
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in ours.model.state_dict().items())
    assert all(parameter.grad is None for parameter in ours.model.parameters()) and ours.model.training


def test_the_peak_is_taken_after_a_warm_up(monkeypatch):
    started, multiply = [], torch.mm

    def slow_at_first(a, b):
        started.append(time.perf_counter())
        if started[-1] < started[0] + 0.04:  # clocks that have not risen yet
            time.sleep(0.02)
        return multiply(a, b)

    monkeypatch.setattr(throughput, "_EDGE", {"cpu": 64})
    monkeypatch.setattr(throughput.torch, "mm", slow_at_first)
    measure_peak.cache_clear()
    measure_peak(torch.device("cpu"), 1)
    measure_peak.cache_clear()
    assert started[-5] >= started[0] + 0.04  # none of the five that count was a slow one


def test_the_pace_counts_steps_and_waiting_apart():
    def slow():
        for number in range(3):
            time.sleep(0.05)
            yield number

    pace = Pace(crops=4, flops=100.0, peak=1000.0)
    for _ in pace.over(slow()):
        time.sleep(0.05)
    record = pace.record()
    assert record["crops_per_s"] == pytest.approx(12 / record["seconds"])
    assert record["share_of_peak"] == pytest.approx(300 / record["seconds"] / 1000)
    assert 0.35 < record["data_wait_share"] < 0.65
    pace.restart()
    assert pace.record()["data_wait_share"] == 0.0


def test_durations_are_told_by_their_largest_unit():
    seconds = (0.2, 1.3, 119, 121, 7300, 200000)
    words = ["a second", "1 second", "119 seconds", "2 minutes", "2 hours", "2 days"]
    assert [duration_told(one) for one in seconds] == words


def test_a_profile_holds_a_trace_and_one_screen(tmp_path):
    store = make_store(tmp_path / "s", [(32, 32, 32)]).path
    settings = TrainConfig(steps=11, batch=2, device="cpu", threads=1, checkpoint_every=100)
    console = Console(file=io.StringIO(), width=200)
    train([store], RunConfig(SMALL, train=settings), tmp_path / "r", console=console, profile=True)
    trace = json.loads((tmp_path / "r/profile/trace.json").read_text(encoding="utf-8"))
    assert any(event.get("name") == "maesil::gather_patches" for event in trace["traceEvents"])
    summary = (tmp_path / "r/profile/summary.txt").read_text(encoding="utf-8")
    for word in ("step ", "data wait", "read", "copy", "aten::"):
        assert word in summary
    assert len(summary.splitlines()) < 25 and summary in console.file.getvalue()
    few = TrainConfig(steps=3, batch=2, device="cpu", threads=1)
    train([store], RunConfig(SMALL, train=few), tmp_path / "few", console=console, profile=True)
    assert "nothing traced, expected at least 10 steps, saw 3" in console.file.getvalue()


BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("zarr", "numcodecs", "pyarrow", "google_crc32c", "pydicom", "SimpleITK", "monai",
                                      "typer", "rich", "dask", "nibabel", "tensorboard", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Refuse())
sys.argv = ["step.py", "--quick", "--no-compile", "--json", sys.argv[1]]
import runpy
sys.path.insert(0, "tests/benchmarks")
runpy.run_path("tests/benchmarks/step.py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_step_benchmark_runs_on_a_bare_machine(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BARE, str(tmp_path / "f.json")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert len(figures["rows"]) >= 5 and all(row["ms"] > 0 and row["gflop"] > 0 for row in figures["rows"])
    assert any("MONAI: No module named 'monai'" in line for line in figures["left_out"])


def test_plain_eager_is_the_same_operation():
    ours, config = learner("maesil"), learner("maesil").config
    part = one_crop(config)
    volume = torch.randint(-1024, 3000, (1, 16, 16, 16), generator=torch.Generator().manual_seed(1)).short()
    lookup = {"patch_size": 8, "window": (-900.0, 800.0), "mean": 0.4, "std": 0.3}
    ids, masked = part.inputs.masks.ids_keep, part.inputs.masks.ids_masked
    pred, weight = torch.randn(1, masked.shape[1], 512), torch.rand(masked.shape)
    for name, args, more in (
        ("gather_patches", (volume, ids), {**lookup, "dtype": torch.float32}),
        ("masked_reconstruction_loss", (pred, volume, masked), {**lookup, "weight": weight}),
        ("unshuffle_tokens", (torch.randn(1, ids.shape[1], 8), ours.model.mask_token,
                              ours.model.decoder_pos_embed, part.inputs.masks.ids_restore, masked), {}),
    ):  # fmt: skip
        torch.testing.assert_close(getattr(naive, name)(*args, **more), getattr(kernels, name)(*args, **more))
