"""``maesil doctor``: what this machine has, what will run where, whether a store fits, and what to change."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

from maesil.cache.memory import available_memory
from maesil.kernels import what_triton_lacks
from maesil.store.store import Store
from maesil.store.summary import summary_of
from maesil.store.urls import StorePlace
from maesil.text import counted

_PACKAGES = ("maesil", "torch", "triton", "numpy", "zarr", "numcodecs", "SimpleITK", "pydicom", "dask", "monai")
_NOT_INSTALLED = {"triton": "not installed; only a GPU has a use for it (extra gpu)"}
_COMPILERS = ("g++", "c++", "clang++")
_NATIVE_BFLOAT16 = (8, 0)
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    section: str
    name: str
    value: str
    advice: str = ""
    """What to change, if anything."""


def examine(store: StorePlace | None = None) -> list[Finding]:
    """Look at this machine, and at a store if one is given. Nothing is written. StoreError if it is no store."""
    opened = Store.open(store) if store else None
    found = [*_software(), *_devices(), *_what_runs_where()]
    return [*found, *_fits(opened)] if opened else found


def report(findings: list[Finding]) -> list[Table | str]:
    """Return the findings as a table and, below it, what to change."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    section = ""
    for finding in findings:
        table.add_row(finding.section if finding.section != section else "", finding.name, finding.value)
        section = finding.section
    advice = [f"change: {finding.advice}" for finding in findings if finding.advice]
    return [table, *(advice or ["nothing to change"])]


def _software() -> Iterator[Finding]:
    yield Finding("software", "python", platform.python_version())
    for name in _PACKAGES:
        try:
            yield Finding("software", name, version(name))
        except PackageNotFoundError:
            yield Finding("software", name, _NOT_INSTALLED.get(name, "not installed"))


def _devices() -> Iterator[Finding]:
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    told = f"{cores} cores for this process, {threads} torch threads, {available_memory() / _GB:.1f} GB of memory free"
    few = threads < cores and "OMP_NUM_THREADS" not in os.environ
    yield Finding("devices", "cpu", told, f"train.threads={cores}: torch takes {threads} of the cores" if few else "")
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        yield Finding(
            "devices", f"cuda:{number}", f"{facts.name}, sm_{facts.major}{facts.minor}, {free / _GB:.1f} of "
            f"{total / _GB:.1f} GB free",
        )  # fmt: skip
    if not torch.cuda.is_available():
        built = "this torch is built for CPUs" if torch.version.cuda is None else "torch finds no driver or no device"
        unused = Path("/proc/driver/nvidia").exists()
        advice = "install a CUDA build of torch: there is a GPU" if unused else ""
        yield Finding("devices", "gpu", f"none: {built}", advice)


def _what_runs_where() -> Iterator[Finding]:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    yield Finding("runs", "train.device=auto", device.type)
    yield _kernels(device)
    yield _number_format(device)
    yield _compile(device)
    told = "for a step that does not fit into memory: keeps less, takes about a third longer, same losses"
    yield Finding("runs", "train.activation_checkpointing=true", told)
    yield Finding("runs", "optimiser", "AdamW, fused: one kernel a step" if gpu else "AdamW, fused for CPUs")
    count = max(1, torch.cuda.device_count())
    together = "gloo and NCCL" if torch.distributed.is_available() and torch.distributed.is_nccl_available() else "gloo"
    yield Finding(
        "runs", "several processes", f"{together}; {count} {'GPUs' if gpu else 'CPU'}",
        f"use all GPUs: torchrun --nproc-per-node {count} -m maesil train ..." if count > 1 else "",
    )  # fmt: skip


def _kernels(device: torch.device) -> Finding:
    why = what_triton_lacks(device)
    if not why:
        return Finding("runs", "train.kernels=auto", "triton")
    advice = f"{why}: without it the voxel operations run in plain PyTorch" if device.type == "cuda" else ""
    return Finding("runs", "train.kernels=auto", f"reference, plain PyTorch: {why}", advice)


def _number_format(device: torch.device) -> Finding:
    if device.type == "cpu":
        return Finding("runs", "arithmetic", "float32: bfloat16 is for GPUs")
    if torch.cuda.get_device_capability() >= _NATIVE_BFLOAT16:
        return Finding("runs", "arithmetic", "bfloat16 by autocast, weights and sums in float32")
    advice = "a GPU of sm_80 or later: this one computes bfloat16 slowly, by other formats"
    return Finding("runs", "arithmetic", "bfloat16, not native on this GPU", advice)


def _compile(device: torch.device) -> Finding:
    compiler = os.environ.get("CXX") or next((name for name in _COMPILERS if shutil.which(name)), None)
    if not compiler or not shutil.which(compiler):
        missing = "a C++ compiler: apt-get install g++, or set CXX"
        return Finding("runs", "train.compile=true", "would fail: no C++ compiler", f"to compile the step, {missing}")
    gain = "worth trying on a GPU" if device.type == "cuda" else f"works ({compiler}), gains nothing on a small CPU"
    return Finding("runs", "train.compile=true", gain)


def _fits(store: Store) -> Iterator[Finding]:
    found, memory = summary_of(store), available_memory()
    decoded, stored = found.decoded_bytes, found.stored_bytes
    yield Finding(
        "store", str(store.path), f"{counted(len(found.volumes), 'volume')}, "
        f"{counted(found.superpatches, 'superpatch', 'superpatches')}, "
        f"{stored / _GB:.2f} GB on disk, {decoded / _GB:.2f} GB decoded",
        "" if found.volumes else "maesil ingest SRC... --out STORE: it holds no volumes",
    )  # fmt: skip
    if isinstance(store.path, Path):
        free = shutil.disk_usage(store.path).free
        short = f"free space where {store.path} lies: less than a tenth of its size is left"
        yield Finding("store", "disk", f"{free / _GB:.1f} GB free where it lies", short if free < stored / 10 else "")
    half = memory / 2
    if decoded <= half:
        told, advice = f"fits into half of the free {memory / _GB:.1f} GB", "--ram auto: read each superpatch once"
    else:
        told, advice = f"more than half of the free {memory / _GB:.1f} GB: read from disk, step by step", ""
    yield Finding("store", "memory", told, advice)
    for number in range(torch.cuda.device_count()):
        room, _ = torch.cuda.mem_get_info(number)
        fits = decoded <= room / 2
        told = f"{'fits' if fits else 'does not fit'} into half of its free {room / _GB:.1f} GB"
        yield Finding(
            "store", f"cuda:{number}", told,
            "--device-resident: keep the superpatches on the GPU" if fits and number == 0 else "",
        )  # fmt: skip
