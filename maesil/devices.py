"""Which device a process computes on, and how tensors and models get there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from maesil.distributed import ALONE, Ranks
from maesil.errors import ResourceError, UsageError, out_of_memory

M = TypeVar("M", bound=nn.Module)


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Return the device a configuration names; ``auto`` is the GPU if there is one. UsageError if there is none.

    Each of several ranks on a machine takes a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and ranks.count > 1:
        return _own_gpu(name, ranks)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"train.device={name}: torch sees {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    return device


def _own_gpu(name: str, ranks: Ranks) -> torch.device:
    if name != "cuda":
        raise UsageError(f"train.device={name} on {ranks.count} ranks: each takes a GPU of its own; use cuda or auto")
    if ranks.on_this_machine > torch.cuda.device_count():
        raise UsageError(
            f"{ranks.on_this_machine} ranks on this machine, torch sees {torch.cuda.device_count()} CUDA devices; "
            "start one rank a GPU (torchrun --nproc-per-node gpu)"
        )
    torch.cuda.set_device(ranks.local)
    return torch.device("cuda", ranks.local)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of the host on a device, without waiting: to a GPU it goes through pinned memory.

    A copy from other memory would begin when the GPU has done all that it was given, and the host would wait for it.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def settled(model: M, device: torch.device) -> M:
    """Move a model to a device; on a GPU with the weights of 3D convolutions channels last, as tensor cores take them.

    The values are the same, and so are checkpoints.
    """
    model = model.to(device)
    if device.type == "cuda" and _convolves(model):
        model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return model


@contextmanager
def convolutions_tuned(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let cuDNN try its algorithms at the first step and keep the fastest, where a model convolves on a GPU."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or (device.type == "cuda" and _convolves(model))
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv3d | nn.ConvTranspose3d) for module in model.modules())


@contextmanager
def memory_errors_named(advice: str) -> Iterator[None]:
    """Turn what torch says where there is no memory left, on a GPU or not, into one line with ``advice``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if told := out_of_memory(error):
            raise ResourceError(f"{told}; {advice}") from error
        raise
