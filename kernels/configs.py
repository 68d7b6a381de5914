"""How each Triton kernel is launched: a frozen table by architecture and shape, read from ``launch_table.json``.

Nothing is tuned while a program runs: equal inputs meet equal kernels, and sums keep their order. The table is made
by ``tests/benchmarks/tune_kernels.py``; shapes it does not name are launched by a rule.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("launch_table.json")
NEWEST = 90
"""The architecture whose settings serve where there is no GPU, under Triton's interpreter."""


@dataclass(frozen=True)
class Launch:
    """One program of a kernel works on a tile of ``rows`` tokens by ``columns`` values, ``steps`` times."""

    rows: int
    columns: int
    warps: int
    steps: int = 1


def launch(operation: str, width: int) -> Launch:
    """Return the settings for an operation on tokens of ``width`` values, on the GPU that Triton compiles for now."""
    return settings(operation, width, _architecture())


@functools.cache
def settings(operation: str, width: int, architecture: int) -> Launch:
    """Look settings up; an architecture that is not in the table takes those of the newest one before it."""
    table = _table()
    known = [int(name) for name in table if int(name) <= architecture] or [min(map(int, table))]
    return table[str(max(known))].get(operation, {}).get(str(width)) or by_rule(operation, width)


def by_rule(operation: str, width: int) -> Launch:
    """Settings for a shape that is not in the table: whole powers of two, so many values a tile that loads overlap."""
    divisor = width & -width  # the largest power of two that divides it
    at_once = 1 << (width - 1).bit_length()
    columns = min(512, divisor if divisor >= 64 else at_once)
    if operation == "unshuffle_subset":  # one row after the other, each thread 8 values of it
        columns = min(1024, at_once)
        return Launch(rows=1, columns=columns, warps=max(1, columns // 256))
    if operation == "unshuffle_backward":  # 128 rows a program: few partial sums to write and to add up
        rows = max(1, 8192 // columns)
        return Launch(rows=rows, columns=columns, warps=8, steps=max(1, 128 // rows))
    return Launch(rows=max(1, 2048 // columns), columns=columns, warps=4)


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Launch]]]:
    document = json.loads(TABLE.read_text(encoding="utf-8"))["architectures"]
    return {
        architecture: {
            operation: {width: Launch(**values) for width, values in widths.items()}
            for operation, widths in operations.items()
        }
        for architecture, operations in document.items()
    }


def _architecture() -> int:
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        return NEWEST
    architecture = driver.active.get_current_target().arch
    return architecture if isinstance(architecture, int) else NEWEST
