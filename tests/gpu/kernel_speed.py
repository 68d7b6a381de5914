"""The kernels on a GPU beside their peers: time, bandwidth, share of a copy's, memory.

Bandwidth is the least an operation must move (32-byte sectors counted) over its time, at 64 samples with inputs rotated
past the L2 cache; latency is at 8 samples. Both are taken from CUDA graphs. Peers: *naive* PyTorch as one writes it
first, with float volumes and targets (`benchmarks/naive.py`); *good* PyTorch, the definition in `kernels/reference.py`;
`torch.compile` of both; the *floor*, a copy of as many bytes. Compiled ways come last: compiling takes longest.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import naive
import torch
import torch._functorch.config
from gpu.part import Given, Row
from torch import Tensor

from maesil import kernels
from maesil.kernels import reference

Call = Callable[[], object]
LOOKUP: dict[str, Any] = {"window": (-1000.0, 1000.0), "mean": 0.3, "std": 0.2}
SECTOR = 32
WAYS = ("maesil", "naive", "good", "compiled naive", "compiled good")


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


def ways() -> dict[str, SimpleNamespace]:
    """Every way to do the three operations, compiled ones compiled anew."""
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
        f"compiled {name}": {key: torch.compile(function) for key, function in functions.items()}
        for name, functions in (("naive", first), ("good", good))
    }
    named = {"maesil": ours, "naive": first, "good": good, **compiled}
    return {name: SimpleNamespace(**named[name]) for name in WAYS}


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


def rows(given: Given) -> Iterator[Row]:
    """Yield a row an operation, way and batch: the ways that compile nothing first."""
    given.require_gpu()
    torch._functorch.config.donated_buffer = False  # compiled backward calls are repeated here
    copy = copy_bandwidth(given.device)
    for compiled in (False, True):
        for shape, sets in ((Shape(8), 1), (Shape(64), 2)):
            yield from measure(shape, sets, copy, [way for way in WAYS if way.startswith("compiled") == compiled])
            torch.cuda.empty_cache()


def measure(shape: Shape, sets: int, copy: float, chosen: Sequence[str]) -> Iterator[Row]:
    """Measure every operation in the chosen ways on ``sets`` inputs in turn, row by row."""
    inputs = [Inputs(shape, seed) for seed in range(sets)]
    least, known = least_bytes(inputs[0]), ways()
    for way in chosen:
        torch._dynamo.reset()
        prepared = [operations(known[way], given) for given in inputs]
        for name, moved in least.items():
            gc.collect()
            taken = microseconds([operation[name] for operation in prepared], shape.device)
            floor = moved / copy * 1e6
            peak = peak_megabytes(prepared[0][name](), shape.device)
            yield {
                "operation": name, "way": way, "batch": shape.batch, "us": round(taken, 2),
                "gigabytes_per_second": round(moved / taken / 1e3, 1), "share_of_copy": round(floor / taken, 3),
                "floor_us": round(floor, 2), "least_megabytes": round(moved / 1e6, 1),
                "peak_megabytes": None if peak is None else round(peak, 1),
            }  # fmt: skip
