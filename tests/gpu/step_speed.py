"""The training step of every preset: as it is, with the kernels off, and compiled.

The rows of `benchmarks/step.py`, by the very `Learner` that trains, at each preset's own sizes and batch. The peak, a
large matrix product, is measured again for every preset. Compiled steps come last: compiling takes longest.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import replace

import step
import torch
from gpu.part import NO_GPU, Given, Row

from maesil.config.presets import PRESETS
from maesil.training.throughput import measure_peak

SIZES = ("tiny", "small", "base", "large")
WAYS = ("eager", "kernels off", "compiled")
COMPILED = ("base", "small", "tiny", "large")
"""The order in which presets are compiled, as long as there is time."""
ROUNDS = 3
SECONDS_A_ROUND = 0.5


def rows(given: Given) -> Iterator[Row]:
    """Yield a row a preset and way."""
    if given.device == "cuda":
        planned = [(preset, way) for preset in SIZES for way in WAYS[:2]]
        planned += [(preset, "compiled") for preset in COMPILED]
    else:
        planned = [("tiny", "eager")]
        for preset in SIZES:
            if preset != "tiny":
                yield {"preset": preset, "way": None, "said": NO_GPU}
    for preset, way in planned:
        try:
            yield _measured(preset, way, torch.device(given.device))
        except torch.OutOfMemoryError:
            yield {"preset": preset, "way": way, "said": "out of GPU memory"}


def _measured(preset: str, way: str, device: torch.device) -> Row:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    config = PRESETS[preset]
    config = replace(config, train=replace(config.train, compile=way == "compiled"))
    measure_peak.cache_clear()
    peak = measure_peak(device, torch.get_num_threads())
    row = step.ours(preset, config, device, chosen="reference" if way == "kernels off" else "auto")
    started = time.perf_counter()
    step.seconds_of(row, 1, device)  # builds what is built at the first step
    first, once = time.perf_counter() - started, step.seconds_of(row, 1, device)
    steps = max(1, min(50, round(SECONDS_A_ROUND / once)))
    taken = sorted(step.seconds_of(row, steps, device) for _ in range(ROUNDS))
    seconds = taken[ROUNDS // 2]
    memory = step.peak_megabytes(row, device)
    return {
        "preset": preset, "way": way, "batch": config.train.batch, "ms": round(1e3 * seconds, 2),
        "crops_per_second": round(config.train.batch / seconds, 1),
        "share_of_peak": round(row.flops / peak / seconds, 4), "spread": round((taken[-1] - taken[0]) / seconds, 3),
        "peak_megabytes": None if memory is None else round(memory), "first_step_seconds": round(first, 1),
        "gflop": round(row.flops / 1e9, 1), "peak_teraflops": round(peak / 1e12, 3),
    }  # fmt: skip
