from __future__ import annotations

import numpy as np
import pytest
import torch

from maesil.devices import memory_errors_named
from maesil.errors import EXIT_RESOURCES, ResourceError, out_of_memory


def test_what_torch_and_numpy_say_without_memory_is_known_and_other_errors_are_not():
    for allocate in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            allocate()
        assert out_of_memory(raised.value).startswith("out of memory (")
    cuda = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB is"
    assert out_of_memory(torch.OutOfMemoryError(cuda)) == "out of GPU memory (Tried to allocate 2.00 GiB)"
    for told in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
    ):
        assert out_of_memory(RuntimeError(told)).startswith("out of GPU memory (")
    assert out_of_memory(MemoryError()) == "out of memory"
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""
    assert out_of_memory(ValueError("out of memory")) == ""


def test_memory_errors_become_one_line_and_others_pass():
    with pytest.raises(ResourceError, match=r"out of memory .*; buy some") as raised, memory_errors_named("buy some"):
        torch.empty(2**60, dtype=torch.uint8)
    assert raised.value.exit_code == EXIT_RESOURCES and "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="another"), memory_errors_named("buy some"):
        raise RuntimeError("another")
