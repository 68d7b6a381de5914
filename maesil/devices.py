"""Which device a process computes on."""

from __future__ import annotations

import torch

from maesil.distributed import ALONE, Ranks
from maesil.errors import UsageError


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Return the device a configuration names; ``auto`` is the GPU if there is one. UsageError if there is none.

    Each of several ranks on a machine takes a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
