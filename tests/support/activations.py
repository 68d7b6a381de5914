"""What autograd keeps for the way back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], Tensor], owned: list[Tensor]) -> tuple[Tensor, int]:
    """Return what ``forward`` returns and the bytes of the storages kept for its gradient, apart from ``owned``."""
    own = {tensor.untyped_storage().data_ptr() for tensor in owned}
    storages: dict[int, int] = {}
    held = []  # so that no storage is freed and its address used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    return result, sum(storages.values())
