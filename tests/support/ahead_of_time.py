"""Compile Triton kernels for GPUs that are not there, through their own launchers, and read the machine code.

Triton asks a *driver* for the architecture, and hands it each finished binary to load. `BinaryCollector` is a driver
that names an architecture, keeps the binaries and runs none: launchers compile for tensors on a CPU exactly the
kernels that they would compile for tensors of the same shapes and alignment on a GPU.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class MachineCode:
    """What a compiled kernel is like."""

    kernel: str
    registers: int
    stack: int
    """Bytes of stack a thread; registers that did not fit go there."""
    local: int
    """Loads and stores of that stack."""
    loads: dict[str, int]
    """How many instructions load from global memory, by width: "128" bits, "64", "32", "U16" ..."""
    stores: dict[str, int]


class BinaryCollector:
    """Stands in for a driver: binaries go to ``self.binaries`` instead of to a GPU."""

    _numbers = itertools.count(1000)

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)
        self.device = next(self._numbers)  # a number of its own, so that no cache of Triton's mixes them up
        self.binaries: list[tuple[str, bytes]] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 160 * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.binaries.append((name, binary))
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, source: object, metadata: object) -> object:
        return lambda *_: None


@contextlib.contextmanager
def compiled_for(architecture: int) -> Iterator[list[tuple[str, bytes]]]:
    """Compile what is launched inside for ``sm_<architecture>``: the yielded list fills with names and binaries."""
    collector, before = BinaryCollector(architecture), driver._active
    driver.set_active(collector)
    try:
        yield collector.binaries
    finally:
        driver._active = before


def read(kernel: str, binary: bytes) -> MachineCode:
    """Disassemble a binary and count."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return MachineCode(
        kernel, registers, stack, len(re.findall(r"\b(?:LDL|STL)\b", code)), _widths("LDG", code), _widths("STG", code)
    )


def _widths(instruction: str, code: str) -> dict[str, int]:
    found = re.findall(rf"\b{instruction}\.([\w.]+)", code)
    widths = [set(modifiers.split(".")) & {"128", "64", "U16", "S16", "U8", "S8"} for modifiers in found]
    return dict(collections.Counter(min(width) if width else "32" for width in widths))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
