"""Every model, head and command on a pretended GPU: nothing mixes devices, streams keep their order, steps wait for
nothing.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from gpu import kernel_speed
from rich.console import Console
from support import pretend_gpu as pretended
from support.labelled import labelled_store
from support.lanes import slow_but
from support.pretend_gpu import Hazard, pretend_gpu
from support.runs import save_run
from support.stores import make_store
from typer.testing import CliRunner

from maesil.cli.program import app
from maesil.config.schema import ModelConfig, RunConfig, TrainConfig
from maesil.data.split import Split
from maesil.downstream.features import write_features
from maesil.downstream.finetune import FinetuneBudget, finetune
from maesil.downstream.probe import probe
from maesil.errors import MaesilError, ResourceError
from maesil.evaluation.evaluate import evaluate
from maesil.evaluation.reconstruct import reconstruct_volume
from maesil.kernels import use_kernels
from maesil.training import throughput
from maesil.training.checkpoint import load_run
from maesil.training.learner import Learner
from maesil.training.train import train
from maesil.training.trainer import Trainer

GPU = "cuda:0"
MODEL = ModelConfig(
    crop=16, width=16, depth=1, decoder_width=16, decoder_depth=1, channels=4, latent=4, codes=6, head="linear"
)
TRAIN = TrainConfig(
    steps=4, batch=4, device=GPU, kernels="reference", threads=1, validation_crops=4, flips="zyx", window_jitter=0.05,
    min_body=0.05, validate_every=2, ema=0.9, log_every=4,
)  # fmt: skip
MODELS = {
    "primus": {"kind": "primus", "width": 18},
    **{kind: {"kind": kind} for kind in ("mae2d", "ae", "vae", "vqvae")},
    **{head: {"head": head} for head in ("linear", "overlap", "interpolate", "refine")},
    **{decoder: {"decoder": decoder} for decoder in ("subset", "cross")},
}


@pytest.fixture(autouse=True)
def small_peak(monkeypatch, one_thread):
    monkeypatch.setitem(throughput._EDGE, "cuda", 64)
    monkeypatch.setitem(throughput._WARM_UP_SECONDS, "cuda", 0.0)
    throughput.measure_peak.cache_clear()
    yield
    throughput.measure_peak.cache_clear()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    make_store(path, [(32, 40, 36), (40, 32, 33), (32, 32, 48)], superpatch=32)
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return labelled_store(tmp_path_factory.mktemp("labelled"), 3)


def run(store, out, model, **changes):
    config = RunConfig(replace(MODEL, **model), train=replace(TRAIN, **changes))
    train([store], config, out, console=Console(file=io.StringIO()))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def same_losses(ours, expected):
    """Up to the rounding of bfloat16."""
    for one, other in zip(ours, expected, strict=True):
        for name in ("loss", "validation_loss"):
            assert one.get(name) == pytest.approx(other.get(name), rel=0.05)


EXPECTED_WAITS = {
    "model = model.to(device)": None,
    "digest.update(value.detach().cpu()": None,  # a checkpoint is written
    "one.values for one in unread": 2,  # two validations, the later one at the end
    "self.ranks.sum(sums)": 5,  # at the end the encoder's worth is taken, too: by three more passes
    "torch.linalg.eigvalsh(covariance_DD.cpu()": 2,
    "order_N.to(latent_BND.device)": None,  # tokens are shuffled at the end
    "unpatchify(to_hu(tokens_BLV": 1,
    "save_reconstruction(": 1,
    "tensor.to(self.device, copy=True": 1,  # the one crop whose operations are counted
}
"""The lines that wait for the device, and how often in all four steps."""


@pytest.mark.parametrize("name", slow_but(MODELS, ("linear",)))
def test_training_on_a_gpu_is_training_and_steps_wait_for_nothing(store, tmp_path, name):
    with pretend_gpu() as gpu:
        ours = run(store, tmp_path / "gpu", MODELS[name])
    same_losses(ours, run(store, tmp_path / "cpu", MODELS[name], device="cpu"))
    assert all(torch.isfinite(value).all() for value in load_run(tmp_path / "gpu").model.state_dict().values())
    for wait, count in Counter(gpu.waits).items():
        known = [times for line, times in EXPECTED_WAITS.items() if line in wait]
        assert known and (known[0] is None or count <= known[0]), (wait, count)


@pytest.mark.slow
def test_scans_that_stay_on_the_gpu_and_micro_batches_give_the_same_losses(store, tmp_path):
    with pretend_gpu():
        plain = {"decorrelation": 0.0}  # its covariances are those of a micro-batch
        read = run(store, tmp_path / "read", plain)
        resident = run(store, tmp_path / "resident", plain, device_resident=True, accumulate=2)
    assert [r["loss"] for r in resident] == pytest.approx([r["loss"] for r in read], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_command_runs_on_a_gpu(labelled, tmp_path, name):
    store, labels, volumes = labelled
    model = replace(MODEL, **MODELS[name])
    path = save_run(tmp_path / "run", Split((volumes[0].group,), ()), model)
    with pretend_gpu(), use_kernels("reference"):
        report = evaluate(path, store.path, device=GPU)
        assert report.document()["rows"]
        if name in ("linear", "primus", "mae2d", "ae", "vae", "vqvae"):
            assert write_features(path, store.path, tmp_path / "f.parquet", device=GPU).rows > 0
            assert reconstruct_volume(path, store.path, volumes[1].volume_id, device=GPU).psnr > 0
            assert probe(path, store.path, labels, patches=300, device=GPU).rows
            budget = FinetuneBudget(steps=2, batch=1, seeds=1)
            assert finetune(path, store.path, labels, tmp_path / "tuned", budget=budget, device=GPU).rows


def test_copies_that_do_not_wait_for_earlier_steps_are_seen(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_mark", lambda self: None)
    with pytest.raises(Hazard, match="freed and is used again"), pretend_gpu():
        run(store, tmp_path / "run", {}, steps=8, validation=0.0)


def test_steps_that_do_not_wait_for_their_copies_are_seen(store, tmp_path, monkeypatch):
    monkeypatch.setattr(pretended.Stream, "synchronize", lambda self: None)
    with pytest.raises(Hazard, match="reads what another stream may not have written yet"), pretend_gpu():
        run(store, tmp_path / "run", {})


def test_a_buffer_filled_before_its_copy_has_ended_is_seen():
    with pretend_gpu():
        buffer = torch.zeros(8, dtype=torch.int16, pin_memory=True)
        buffer.to(GPU, non_blocking=True)
        buffer += 1
        with pytest.raises(Hazard, match="pinned buffer"):
            torch.cuda.synchronize()


def test_mixed_devices_are_seen():
    with pretend_gpu():
        with pytest.raises(Hazard, match=r"cuda:0 and one of the CPU \[3\]"):
            torch.ones(3, device=GPU) + torch.ones(3)
        torch.ones(3, device=GPU) + torch.ones(())  # a number


def test_a_loss_that_is_not_finite_changes_nothing_more_and_is_told_at_the_next_reading(store, tmp_path, monkeypatch):
    weights, learn = [], Learner.learn

    def poisoned(self, micro_batches, crops=""):
        if self.step == 2:  # the third step
            micro_batches = [replace(one, weight_BS=one.weight_BS * torch.nan) for one in micro_batches]
        learn(self, micro_batches, crops=f"the crops of step {self.step + 1}")
        weights.append([parameter.detach().to("cpu").clone() for parameter in self.model.parameters()])

    monkeypatch.setattr(Learner, "learn", poisoned)
    with pytest.raises(MaesilError, match=r"step 3: loss nan.*the crops of step 3$"), pretend_gpu():
        run(store, tmp_path / "run", {}, steps=4, log_every=4, validation=0.0, checkpoint_every=4, ema=0.0)
    assert len(weights) == 4  # nobody looked in between
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    for later in weights[2:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[1], later, strict=True))
    assert load_run(tmp_path / "run").step == 0


def test_convolutions_on_a_gpu_lie_channels_last_and_cudnn_chooses(store, tmp_path, monkeypatch):
    seen, step = {}, Trainer.training_step

    def look(self, prepared):
        volumes = [p for p in self.model.parameters() if p.ndim == 5 and p.shape[1] > 1]
        last = all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in volumes)
        seen[self.config.model.kind, self.device.type] = last and torch.backends.cudnn.benchmark
        step(self, prepared)

    monkeypatch.setattr(Trainer, "training_step", look)
    before = torch.backends.cudnn.benchmark
    with pretend_gpu():
        run(store, tmp_path / "ae", {"kind": "ae"}, steps=1, validation=0.0)
        run(store, tmp_path / "mae", {}, steps=1, validation=0.0)
    run(store, tmp_path / "cpu", {"kind": "ae"}, steps=1, validation=0.0, device="cpu")
    assert seen == {("ae", "cuda"): True, ("maesil", "cuda"): False, ("ae", "cpu"): False}
    assert torch.backends.cudnn.benchmark is before


def test_out_of_memory_in_training_names_what_helps(store, tmp_path):
    with pretend_gpu(memory=2**18), pytest.raises(ResourceError, match=r"out of GPU memory \(.*allocate.*accumulate"):
        run(store, tmp_path / "run", {})


@pytest.mark.parametrize("command", ["evaluate", "features"])
def test_out_of_memory_elsewhere_is_one_line_and_exit_5(labelled, tmp_path, command):
    store, _, volumes = labelled
    path = save_run(tmp_path / "run", Split((volumes[0].group,), ()), MODEL)
    out = ["--out", str(tmp_path / "out")]
    with pretend_gpu(memory=2**16), use_kernels("reference"):
        done = CliRunner().invoke(app, [command, str(path), str(store.path), "--device", GPU, *out])
    assert done.exit_code == 5, done.output
    (line,) = [line for line in done.output.splitlines() if "memory" in line]
    assert line.startswith("error: out of GPU memory (") and "Tried to allocate" in line and "--device cpu" in line


def test_no_way_of_the_kernel_table_copies_from_the_host():
    # Such a copy waits, and is illegal in the CUDA graph that the table is measured in.
    with pretend_gpu() as gpu, use_kernels("reference"):
        given = kernel_speed.Inputs(kernel_speed.Shape(batch=2, edge=16, width=24, device=GPU), seed=0)
        gpu.waits.clear()
        for name, way in kernel_speed.ways().items():
            if "compiled" not in name:
                for prepare in kernel_speed.operations(way, given).values():
                    prepare()()
        assert gpu.waits == []
