"""The training step beside its floor and its peers: eager PyTorch, and MONAI's masked autoencoder of the same sizes.

    python tests/benchmarks/step.py [--preset base] [--batch 8] [--json FILE]

Needs torch and numpy, Triton on a GPU, MONAI for MONAI's rows (left out, and said so, where it is not installed), and
the repository's root on PYTHONPATH; no store, since all crops are the same random voxels in memory. A row is one
optimiser step: masks drawn and copied before the clock, forward, loss, backward, clip, AdamW. *floor*: the row's own
operations, counted by torch, at the speed of a large matrix product measured in the same run. *plain eager*: the same
model with float volumes and float32 targets, as `naive.py` writes them. *reference*: with the definitions in
`kernels/reference.py`, which on a CPU are what runs anyway. Rows take turns, `--rounds` of them; the median
counts, so that whatever else the machine does meets all alike. ``--quick`` tries every row once, tiny: not for figures.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import naive
import torch
from torch import Tensor, nn

import maesil.models.masked_autoencoder
import maesil.models.masked_input
from maesil import kernels
from maesil.config.presets import PRESETS
from maesil.config.schema import ModelConfig, RunConfig
from maesil.models.masked_autoencoder import MaskedAutoencoder
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import draw_targets, make_masks
from maesil.models.patches import patchify
from maesil.training.flops import count_flops
from maesil.training.learner import Learner, MicroBatch
from maesil.training.optim import make_optimizer
from maesil.training.throughput import flops_per_crop, measure_peak, wait_for
from maesil.types import Intensity

INTENSITY = Intensity((-1000.0, 1000.0), 0.3, 0.2)
WARM_UP = 2


@dataclass(frozen=True)
class Row:
    """One way to take a step."""

    name: str
    step: Callable[[], object]
    flops: float
    """Of a step."""
    parameters: int
    operators: ModuleType = kernels
    """Where the three voxel operations come from."""
    chosen: str = "auto"
    """For ours: see `maesil.kernels.use_kernels`."""


def widths_for_all(model: ModelConfig) -> ModelConfig:
    """Round widths up to what all rows take: whole heads of 64, and MONAI's position codes."""
    width, decoder_width = (-(-wanted // 192) * 192 for wanted in (model.width, model.decoder_width))
    return replace(model, width=width, decoder_width=decoder_width)


def voxels(config: ModelConfig, batch: int, device: torch.device) -> Tensor:
    """Make int16 HU ``[B, c, c, c]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1024, 3072, (batch, *config.crop_zyx), generator=generator).short().to(device)


def part_of(config: RunConfig, volume: Tensor) -> MicroBatch:
    """Mask and weigh crops as the trainer does."""
    seeds = range(len(volume))
    masks = make_masks(config.mask, config.model.grid, seeds, volume.device)
    lean = config.model.decoder != "full"
    targets = draw_targets(masks, config.model.decoded, seeds) if lean else None
    pictured = slice(None, None, config.train.picture_head_every)
    inputs = MaskedInput(volume, masks, INTENSITY, config.model.patch, ids_target=targets, pictured=pictured)
    weight = torch.ones(inputs.targets.shape, device=volume.device)
    return MicroBatch(inputs, weight, weight[inputs.pictured])


def ours(
    name: str, config: RunConfig, device: torch.device, operators: ModuleType = kernels, chosen: str = "auto"
) -> Row:
    """Our step, by the very `Learner` that trains."""
    model = MaskedAutoencoder(config.model)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    learner = Learner(config=config, device=device, model=model, optimizer=make_optimizer(model, config.train))
    volume = voxels(config.model, config.train.batch, device)
    part = part_of(config, volume)
    flops = config.train.batch * flops_per_crop(learner, part_of(config, volume[:1]))
    return Row(name, lambda: learner.learn([part]), flops, _parameters(model), operators, chosen)


def monai(config: RunConfig, device: torch.device) -> Row:
    """MONAI's `MaskedAutoEncoderViT` with our widths, depths and heads, on float32 crops as its transforms leave
    them.

    It hides three quarters of the tokens at random and has a linear head; the loss, which MONAI leaves to its user, is
    the mean squared error on hidden patches. Optimiser, clipping and autocast are ours.
    """
    from monai.networks.nets import MaskedAutoEncoderViT

    sizes = config.model
    model = MaskedAutoEncoderViT(
        in_channels=1, img_size=sizes.crop_zyx, patch_size=sizes.patch_zyx, hidden_size=sizes.width,
        mlp_dim=4 * sizes.width, num_layers=sizes.depth, num_heads=sizes.heads, masking_ratio=0.75,
        decoder_hidden_size=sizes.decoder_width, decoder_mlp_dim=4 * sizes.decoder_width,
        decoder_num_layers=sizes.decoder_depth, decoder_num_heads=sizes.decoder_heads, spatial_dims=3,
    ).to(device)  # fmt: skip
    optimizer = make_optimizer(model, config.train)
    hu = voxels(sizes, config.train.batch, device).float()
    lo, hi = INTENSITY.window
    volume = (((hu.clamp(lo, hi) - lo) / (hi - lo) - INTENSITY.mean) / INTENSITY.std)[:, None]

    def backward(crops: Tensor) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            pred, mask = model(crops)
        error = (pred.float() - patchify(crops[:, 0], sizes.patch)).square().mean(dim=-1)
        ((error * mask).sum() / mask.sum()).backward()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        backward(volume)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        value = float(norm)
        optimizer.step()
        return value

    flops = config.train.batch * count_flops(lambda: backward(volume[:1]))
    return Row("MONAI MaskedAutoEncoderViT", step, flops, _parameters(model))


def rows_of(config: RunConfig, device: torch.device, compiled: bool) -> tuple[list[Row], list[str]]:
    """Set up every row that runs here; and say which does not, and why."""
    full = replace(config, model=replace(config.model, decoder="full"))
    as_mae = replace(full, model=replace(full.model, picture_head="none"))
    rows = [
        ours("maesil", config, device),
        ours("maesil, plain eager", config, device, operators=naive),
        ours("maesil, decoder full", full, device),
        ours("maesil, parts of MAE", as_mae, device),
        ours("maesil, parts of MAE, plain eager", as_mae, device, operators=naive),
    ]
    left_out = []
    if device.type == "cuda":
        rows.append(ours("maesil, reference", config, device, chosen="reference"))
    if compiled:
        rows.append(ours("maesil, compiled", _compiled(config), device))
        rows.append(ours("maesil, parts of MAE, compiled", _compiled(as_mae), device))
    else:
        left_out.append("compiled rows: not asked for (--compile), or no C++ compiler here")
    try:
        rows.append(monai(as_mae, device))
    except ImportError as error:
        left_out.append(f"MONAI: {str(error).splitlines()[0]}")
    return rows, left_out


def _compiled(config: RunConfig) -> RunConfig:
    return replace(config, train=replace(config.train, compile=True))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def seconds_of(row: Row, steps: int, device: torch.device) -> float:
    """Take steps, and return what one took."""
    with ExitStack() as stack:
        stack.enter_context(kernels.use_kernels(row.chosen))
        for module in (maesil.models.masked_autoencoder, maesil.models.masked_input):
            stack.enter_context(mock.patch.object(module, "kernels", row.operators))
        wait_for(device)
        started = time.perf_counter()
        for _ in range(steps):
            row.step()
        wait_for(device)
    return (time.perf_counter() - started) / steps


def measure(rows: list[Row], batch: int, rounds: int, steps: int, device: torch.device) -> list[dict[str, object]]:
    """Time the rows in turn; the peak of every round stands beside that round's times."""
    peak = measure_peak(device, torch.get_num_threads())
    for row in rows:
        seconds_of(row, WARM_UP, device)
    taken: list[list[float]] = [[] for _ in rows]
    for _ in range(rounds):
        for row, times in zip(rows, taken, strict=True):
            times.append(seconds_of(row, steps, device))
        measure_peak.cache_clear()
        peak = max(peak, measure_peak(device, torch.get_num_threads()))
    found = []
    for row, times in zip(rows, taken, strict=True):
        seconds, floor = statistics.median(times), row.flops / peak
        found.append(
            {
                "row": row.name, "ms": 1e3 * seconds, "crops_per_second": batch / seconds,
                "gflop": row.flops / 1e9, "floor_ms": 1e3 * floor, "share_of_peak": floor / seconds,
                "parameters": row.parameters, "spread": (max(times) - min(times)) / seconds,
                "peak_megabytes": peak_megabytes(row, device), "peak_flops": peak,
            }
        )  # fmt: skip
    return found


def peak_megabytes(row: Row, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds_of(row, 1, device)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def machine(device: torch.device) -> str:
    """Name what the figures were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--preset", choices=PRESETS, default="base" if gpu else "tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10 if gpu else 1, help="steps a row and round")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    config = PRESETS[asked.preset]
    train = replace(config.train, batch=asked.batch, compile=False)
    config = replace(config, model=widths_for_all(config.model), train=train)
    if asked.quick:
        small = replace(config.model, crop=32, depth=1, decoder_depth=1)
        config, asked.rounds = replace(config, model=small, train=replace(config.train, batch=2)), 1
    rows, left_out = rows_of(config, device, asked.compile and shutil.which("g++") is not None)
    found = measure(rows, config.train.batch, asked.rounds, asked.steps, device)
    about = {
        "device": machine(device), "date": datetime.date.today().isoformat(), "torch": str(torch.__version__),
        "triton": kernels.can_run_triton(device), "preset": asked.preset, "batch": config.train.batch,
        "width": config.model.width, "decoder_width": config.model.decoder_width, "quick": asked.quick,
        "left_out": left_out, "rows": found,
    }  # fmt: skip
    print(
        f"{about['device']}, torch {about['torch']}, preset {asked.preset} with widths {config.model.width} and "
        f"{config.model.decoder_width}, batch {config.train.batch}"
    )
    print(f"{'row':36} {'ms':>9} {'sp/s':>8} {'GFLOP':>8} {'floor ms':>9} {'of peak':>8} {'M par.':>7} {'spread':>7}")
    for r in found:
        print(
            f"{r['row']:36} {r['ms']:9.1f} {r['crops_per_second']:8.2f} {r['gflop']:8.1f} {r['floor_ms']:9.1f} "
            f"{r['share_of_peak']:8.1%} {r['parameters'] / 1e6:7.2f} {r['spread']:7.1%}"
        )
    print(*left_out, sep="\n")
    if asked.json:
        asked.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
