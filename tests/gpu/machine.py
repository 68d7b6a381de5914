"""What the figures were taken on, and its two ceilings: a copy's bandwidth and a large matrix product's speed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu.kernel_speed import copy_bandwidth
from gpu.part import Given, Row

from maesil.training.throughput import measure_peak

ASKED = {
    "name": "GPU", "driver_version": "driver", "memory.total": "GPU memory", "clocks.sm": "SM clock",
    "clocks.max.sm": "highest SM clock", "clocks.mem": "memory clock", "power.limit": "power limit",
    "temperature.gpu": "temperature (C)",
}  # fmt: skip
"""What nvidia-smi is asked for, and what a row calls it."""


def rows(given: Given) -> Iterator[Row]:
    """Yield what there is, by name."""
    for name in ("torch", "triton", "numpy"):
        yield {"what": name, "value": _version(name)}
    yield {"what": "Python", "value": platform.python_version()}
    yield {"what": "CPU", "value": f"{platform.machine()}, {os.cpu_count()} cores"}
    if given.device == "cuda":
        yield from _gpu()
        yield {"what": "copy of 1 GiB (GB/s, read and written)", "value": round(copy_bandwidth("cuda") / 1e9)}
    kind = "bfloat16" if given.device == "cuda" else "float32"
    peak = measure_peak(torch.device(given.device), torch.get_num_threads())
    yield {"what": f"large matrix product, {kind} (TFLOP/s)", "value": round(peak / 1e12, 3)}
    if given.device == "cuda":  # right after work: an idle GPU lowers its clocks
        yield from ({"what": f"{row['what']} at work", "value": row["value"]} for row in _clocks())
    else:
        given.require_gpu()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> Iterator[Row]:
    found = torch.cuda.get_device_properties(0)
    yield {"what": "GPU", "value": found.name}
    yield {"what": "compute capability", "value": f"{found.major}.{found.minor}"}
    yield {"what": "multiprocessors", "value": found.multi_processor_count}
    yield {"what": "CUDA of torch", "value": torch.version.cuda}
    yield from (row for row in _clocks() if row["what"] != "GPU")


def _clocks() -> Iterator[Row]:
    if shutil.which("nvidia-smi") is None:
        yield {"what": "nvidia-smi", "value": "not found"}
        return
    asked = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(asked, capture_output=True, text=True)
    values = done.stdout.strip().split(", ")
    if done.returncode or len(values) != len(ASKED):
        yield {"what": "nvidia-smi", "value": (done.stdout + done.stderr).strip()[:200]}
        return
    yield from ({"what": what, "value": value} for what, value in zip(ASKED.values(), values, strict=True))
