"""The kernels on a GPU beside their peers: time, bandwidth, share of a copy's, memory; then a whole training step.

    python tests/benchmarks/kernels_gpu.py [--json FILE]     # `make gpu` runs the tests first, then this

The file is written anew after every row, so that whatever cuts the script off leaves the rows before it.

Needs torch and triton only, and the repository's root on PYTHONPATH. Bandwidth is the least an operation must move
(32-byte sectors counted) over its time, at 64 samples with inputs rotated past the L2 cache; latency is at 8 samples.
Both are taken from CUDA graphs. Peers: *naive* PyTorch as one writes it first, with float volumes and targets; *good*
PyTorch, the definition in `kernels/reference.py`; `torch.compile` of both; the *floor*, a copy of as many bytes.
``--smoke`` runs every line on a CPU with tiny shapes, for what it is worth: not for figures.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import naive
import torch
import torch._functorch.config
import triton
from torch import Tensor

import maesil.models.masked_autoencoder
import maesil.models.masked_input
from maesil import kernels
from maesil.config.presets import PRESETS
from maesil.config.schema import MaskConfig, ModelConfig
from maesil.kernels import reference
from maesil.models.masking import Masks, make_masks
from maesil.training.optim import make_optimizer
from maesil.types import Intensity

Call = Callable[[], object]
LOOKUP: dict[str, Any] = {"window": (-1000.0, 1000.0), "mean": 0.3, "std": 0.2}
SECTOR = 32


@dataclass(frozen=True)
class Shape:
    """What an operation is measured on."""

    batch: int
    edge: int = 128
    patch: int = 8
    width: int = 512
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return (self.edge // self.patch) ** 3


class Inputs:
    """One set of inputs for all operations: a quarter of the tokens is visible."""

    def __init__(self, shape: Shape, seed: int) -> None:
        generator = torch.Generator(shape.device).manual_seed(seed)
        on = {"device": shape.device, "generator": generator}
        self.patch, edges = shape.patch, (shape.edge,) * 3
        self.volume = torch.randint(-1024, 3072, (shape.batch, *edges), dtype=torch.int16, **on)
        ids = torch.stack([torch.randperm(shape.tokens, **on) for _ in range(shape.batch)])
        shown = shape.tokens // 4
        self.ids_keep = ids[:, :shown].sort(dim=1)[0].contiguous()
        self.ids_masked = ids[:, shown:].sort(dim=1)[0].contiguous()
        self.ids_restore = torch.cat([self.ids_keep, self.ids_masked], dim=1).argsort(dim=1)
        low = {**on, "dtype": torch.bfloat16}
        self.pred = torch.randn((*self.ids_masked.shape, shape.patch**3), **low).requires_grad_()
        self.weight = torch.rand(self.ids_masked.shape, **on)
        self.visible = torch.randn((shape.batch, shown, shape.width), **low).requires_grad_()
        self.mask_token = torch.randn(shape.width, **on).requires_grad_()
        self.pos_embed = torch.randn((shape.tokens, shape.width), **on)
        self.grad_tokens = torch.randn((shape.batch, shape.tokens, shape.width), **low)

    def sectors(self, ids: Tensor) -> int:
        """Bytes of the sectors of the volume in which the patches ``ids`` lie."""
        row = self.patch * self.volume.element_size()
        shared = max(1, SECTOR // row)  # patches beside each other along x that share a sector
        touched = sum(len((sample // shared).unique()) for sample in ids)
        return touched * self.patch**2 * max(SECTOR, row)


def size_of(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def ways(smoke: bool) -> dict[str, SimpleNamespace]:
    """Every way to do the three operations, compiled ones compiled anew."""
    backend = "aot_eager" if smoke else "inductor"
    first = {
        "gather": naive.gather_patches,
        "unshuffle": naive.unshuffle_tokens,
        "loss": naive.masked_reconstruction_loss,
    }
    good = {
        "gather": reference.gather_patches,
        "unshuffle": reference.unshuffle_tokens,
        "loss": reference.masked_reconstruction_loss,
    }
    ours = {
        "gather": kernels.gather_patches,
        "unshuffle": kernels.unshuffle_tokens,
        "loss": kernels.masked_reconstruction_loss,
    }
    compiled = {
        f"compiled {name}": {key: torch.compile(function, backend=backend) for key, function in functions.items()}
        for name, functions in (("naive", first), ("good", good))
    }
    named = {"maesil": ours, "naive": first, "good": good, **compiled}
    return {name: SimpleNamespace(**functions) for name, functions in named.items()}


def operations(way: SimpleNamespace, given: Inputs) -> dict[str, Callable[[], Call]]:
    """Forward and backward calls of one way; a backward call is prepared by its forward, outside of the clock."""
    lookup = {"patch_size": given.patch, **LOOKUP}

    def gather() -> Tensor:
        return way.gather(given.volume, given.ids_keep, dtype=torch.bfloat16, **lookup)

    def unshuffle() -> Tensor:
        return way.unshuffle(given.visible, given.mask_token, given.pos_embed, given.ids_restore)

    def loss() -> Tensor:
        return way.loss(given.pred, given.volume, given.ids_masked, weight=given.weight, **lookup)

    def unshuffle_backward() -> Call:
        tokens, leaves = unshuffle(), (given.visible, given.mask_token)
        return lambda: torch.autograd.grad(tokens, leaves, given.grad_tokens, retain_graph=True)

    def loss_backward() -> Call:
        value = loss()
        return lambda: torch.autograd.grad(value, given.pred, retain_graph=True)

    return {
        "gather": lambda: gather, "unshuffle": lambda: unshuffle, "unshuffle backward": unshuffle_backward,
        "loss": lambda: loss, "loss backward": loss_backward,
    }  # fmt: skip


def least_bytes(given: Inputs) -> dict[str, int]:
    """What each operation must move at least."""
    looked_up = given.sectors(given.ids_masked) + size_of(given.ids_masked, given.weight)
    voxels = given.pred.shape[-1]
    patches = given.ids_keep.numel() * voxels * 2
    return {
        "gather": given.sectors(given.ids_keep) + size_of(given.ids_keep) + patches,
        "unshuffle": size_of(given.visible, given.pos_embed, given.ids_restore, given.grad_tokens),
        "unshuffle backward": size_of(given.grad_tokens, given.visible, given.ids_restore),
        "loss": looked_up + size_of(given.pred),
        "loss backward": looked_up + 2 * size_of(given.pred),
    }


def microseconds(prepare: list[Callable[[], Call]], device: str) -> float:
    """Time one call: the median over replays of a CUDA graph that makes each prepared call in turn."""
    if device == "cpu":
        calls = [each() for each in prepare]
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls) * 1e6
    stream = torch.cuda.Stream()  # forward calls run on the stream that is captured: backward ones follow them there
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = [each() for each in prepare]
        for call in [*calls, *calls, *calls]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    samples = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(samples[5:])


def peak_megabytes(call: Call, device: str) -> float | None:
    """Memory that a call needs beyond what is there before it."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (microseconds([lambda: lambda: target.copy_(source)], device) * 1e-6)


def measure(shape: Shape, sets: int, copy: float, smoke: bool) -> Iterator[dict[str, object]]:
    """Measure every operation in every way on ``sets`` inputs in turn, row by row."""
    inputs = [Inputs(shape, seed) for seed in range(sets)]
    least = least_bytes(inputs[0])
    for way, functions in ways(smoke).items():
        torch._dynamo.reset()
        prepared = [operations(functions, given) for given in inputs]
        for name, moved in least.items():
            gc.collect()
            taken = microseconds([operation[name] for operation in prepared], shape.device)
            floor = moved / copy * 1e6
            row = {
                "operation": name, "way": way, "batch": shape.batch, "us": round(taken, 2),
                "gigabytes_per_second": round(moved / taken / 1e3, 1), "share_of_copy": round(floor / taken, 3),
                "floor_us": round(floor, 2), "least_megabytes": round(moved / 1e6, 1),
                "peak_megabytes": peak_megabytes(prepared[0][name](), shape.device),
            }  # fmt: skip
            print("{operation:19} {way:15} B={batch:<3} {us:10.1f} us {gigabytes_per_second:8.1f} GB/s "
                  "{share_of_copy:6.1%} of copy, peak {peak_megabytes} MB".format(**row), flush=True)  # fmt: skip
            yield row


def whole_step(smoke: bool, device: str) -> Iterator[dict[str, object]]:
    """Time training steps of preset base: kernels and definitions, both as they are and compiled whole."""
    definitions = SimpleNamespace(
        gather_patches=reference.gather_patches,
        unshuffle_tokens=reference.unshuffle_tokens,
        masked_reconstruction_loss=reference.masked_reconstruction_loss,
    )
    for way, operators, compiled in (
        ("maesil", kernels, False), ("maesil compiled", kernels, True),
        ("good", definitions, False), ("good compiled", definitions, True),
    ):  # fmt: skip
        torch._dynamo.reset()
        gc.collect()
        batch, steps = (2, 2) if smoke else (8, 20)
        with (
            mock.patch.object(maesil.models.masked_autoencoder, "kernels", operators),
            mock.patch.object(maesil.models.masked_input, "kernels", operators),
        ):
            step = training_step(batch, compiled, smoke, device)
            for _ in range(3):
                step()
            peak = peak_megabytes(step, device)
            _wait(device)
            started = time.perf_counter()
            for _ in range(steps):
                step()
            _wait(device)
        taken = (time.perf_counter() - started) / steps
        row = {
            "way": way, "batch": batch, "ms": round(taken * 1e3, 2),
            "crops_per_second": round(batch / taken, 1), "peak_megabytes": peak,
        }  # fmt: skip
        print("step {way:15} B={batch} {ms:8.2f} ms {crops_per_second:7.1f} crops/s, "
              "peak {peak_megabytes} MB".format(**row), flush=True)  # fmt: skip
        yield row


def training_step(batch: int, compiled: bool, smoke: bool, device: str) -> Call:
    """Set up a model and an optimiser, and return one step of them, on the same batch every time."""
    config = ModelConfig(crop=16, width=16, depth=1, decoder_width=16) if smoke else PRESETS["base"].model
    volume = torch.randint(-1024, 3072, (batch, *config.crop_zyx), dtype=torch.int16, device=device)
    masks = make_masks(MaskConfig(), config.grid, range(batch), device)
    weight = torch.rand(masks.ids_masked.shape, device=device)
    intensity = Intensity((-1000.0, 1000.0), 0.3, 0.2)
    model = maesil.models.masked_autoencoder.MaskedAutoencoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    optimizer = make_optimizer(model, PRESETS["base"].train)

    def loss_of(ids_keep: Tensor, ids_masked: Tensor, ids_restore: Tensor, mask: Tensor) -> Tensor:
        chosen = Masks(ids_keep, ids_masked, ids_restore, mask)
        inputs = maesil.models.masked_input.MaskedInput(volume, chosen, intensity, config.patch)
        with torch.autocast(device, dtype=torch.bfloat16):
            pred = model(inputs).patches_BSV
        return inputs.loss(pred, weight)

    backend = "aot_eager" if smoke else "inductor"
    run = torch.compile(loss_of, fullgraph=True, backend=backend) if compiled else loss_of

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        run(masks.ids_keep, masks.ids_masked, masks.ids_restore, masks.mask).backward()
        optimizer.step()

    return step


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="every line on a CPU, tiny: no figures to quote")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        raise SystemExit("kernels_gpu.py: expected a CUDA GPU, torch sees none; --smoke tries the script on a CPU")
    torch._functorch.config.donated_buffer = False  # compiled backward calls are repeated here
    device = "cpu" if arguments.smoke else "cuda"
    copy = copy_bandwidth(device)
    print(f"copy: {copy / 1e9:.0f} GB/s")
    tiny = {"edge": 16, "width": 32, "device": "cpu"} if arguments.smoke else {}
    about: dict[str, object] = {
        "device": "cpu (smoke)" if arguments.smoke else torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gigabytes_per_second": round(copy / 1e9, 1),
    }
    tables = {
        "latency": measure(Shape(2 if arguments.smoke else 8, **tiny), 1, copy, arguments.smoke),
        "bandwidth": measure(Shape(3 if arguments.smoke else 64, **tiny), 2, copy, arguments.smoke),
        "step": whole_step(arguments.smoke, device),
    }
    write_row_by_row(about, tables, arguments.json)


def write_row_by_row(
    about: dict[str, object], tables: Mapping[str, Iterable[dict[str, object]]], path: Path | None
) -> None:
    """Fill the tables, and write all there is after every row."""
    figures = {**about, **{name: list[dict[str, object]]() for name in tables}}
    for name, rows in tables.items():
        for row in rows:
            figures[name].append(row)  # type: ignore[attr-defined]
            if path:
                partial = path.with_name(path.name + ".partial")
                partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
                partial.replace(path)


if __name__ == "__main__":
    main()
