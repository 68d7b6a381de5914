"""Masks beside their definition by sorting: the same masks, and how long a step's take on one thread.

    python tests/benchmarks/masks.py [--json FILE]

The peer draws sample by sample and finds every order by a sort, as facebookresearch/mae's ``random_masking`` does.
Rows take turns; medians count. Needs torch alone, and the repository's root on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from maesil.config.schema import MaskConfig, hidden_count
from maesil.models.masking import Masks, make_masks
from maesil.types import Zyx

KINDS = ("dual", "random", "tube", "slab")
GRID, BATCH, ROUNDS = (16, 16, 16), 16, 30


def by_sorting(config: MaskConfig, grid: Zyx, seeds: Sequence[int]) -> Masks:
    """Make the masks of `maesil.models.masking.make_masks` by their definition."""
    hidden_BL = torch.stack([_hidden(config, grid, torch.Generator().manual_seed(seed)) for seed in seeds])
    ids_shuffle = torch.argsort(hidden_BL.to(torch.uint8), dim=1, stable=True)
    keep = hidden_BL.shape[1] - int(hidden_BL[0].sum())
    parts = ids_shuffle[:, :keep].contiguous(), ids_shuffle[:, keep:].contiguous()
    return Masks(*parts, ids_restore=torch.argsort(ids_shuffle, dim=1), mask=hidden_BL.float())


def _hidden(config: MaskConfig, grid: Zyx, generator: torch.Generator) -> Tensor:
    (gz, gy, gx), shares = grid, {name: hidden for name, (hidden, _) in config.parts(grid).items()}
    hidden = torch.zeros(gz, gy * gx, dtype=torch.bool)
    if config.kind == "random":
        hidden.view(-1)[_order((gz * gy * gx,), generator)[: shares["share"]]] = True
        return hidden.flatten()
    columns = _order((gy * gx,), generator)
    hidden[:, columns[: shares["plane"]]] = True
    if config.kind == "dual":
        left = columns[shares["plane"] :]
        for layer, order in zip(hidden, _order((gz, len(left)), generator), strict=True):
            layer[left[order[: hidden_count(config.axis, len(left))]]] = True
    if config.kind == "slab":
        hidden[_order((gz,), generator)[: shares["axis"]]] = True
    return hidden.flatten()


def _order(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator).argsort(dim=-1, stable=True)


def milliseconds(call: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in KINDS:
        config = MaskConfig(kind=kind)
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda config=config: make_masks(config, GRID, range(BATCH)),  # type: ignore[misc]
            "by_sorting": lambda config=config: by_sorting(config, GRID, range(BATCH)),  # type: ignore[misc]
        }
        taken = [{name: milliseconds(call) for name, call in ways.items()} for _ in range(ROUNDS)]
        medians = {name: statistics.median(one[name] for one in taken) for name in ways}
        rows.append({"kind": kind, "ms": medians["ours"], "ms_by_sorting": medians["by_sorting"]})
        print("{kind:8} {ms:7.2f} ms  by sorting {ms_by_sorting:7.2f} ms".format(**rows[-1]))
    about = {"machine": platform.machine(), "torch": str(torch.__version__), "date": str(datetime.date.today())}
    if asked.json:
        document = {**about, "batch": BATCH, "grid": GRID, "threads": 1, "rows": rows}
        asked.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
