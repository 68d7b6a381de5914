"""The kernels compiled for GPUs that are not here: nothing spills, memory is met 16 bytes at a time, registers stay.

``registers.json`` holds the most registers a thread may use, by architecture and case. To renew it after a change
that is worth its registers: ``MAESIL_RENEW_GOLDEN=1 pytest tests/kernels/test_ahead_of_time.py``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.ahead_of_time import MachineCode, compiled_for, read
from support.lanes import slow_but

from maesil.config.presets import PRESETS
from maesil.kernels import configs, gather, loss, unshuffle
from maesil.kernels.reference import Size, edges_of

GOLDEN = Path(__file__).with_name("registers.json")
ARCHITECTURES = (80, 90, 100)
SLACK = 1.25
"""How much more another version of the compiler may use."""


def patch_calls(patch: Size, dtype: torch.dtype, edge: int = 96, batch: int = 2) -> dict[str, Callable[[], object]]:
    """Gather and loss as training calls them, on scans whose edge is divisible by 8."""
    voxels = math.prod(edges_of(patch))
    tokens = edge**3 // voxels
    volume = torch.empty(batch, edge, edge, edge, dtype=torch.int16)  # never read
    ids = torch.empty(batch, tokens // 2, dtype=torch.int64)
    whole = {"patch_size": patch, "window": (-1000.0, 1000.0), "mean": 0.3, "std": 0.2}
    whole |= {"origin": None, "flip": None, "size": None}
    flipped = {**whole, "flip": torch.zeros(batch, 3, dtype=torch.bool)}
    placed = {**flipped, "origin": torch.zeros(batch, 3, dtype=torch.int64), "size": edge // 2}
    placed["window"] = torch.zeros(batch, 2)
    pred = torch.empty(*ids.shape, voxels, dtype=dtype)
    error = {"norm_patch": False, "eps": 1e-6, "weight": torch.zeros(ids.shape)}
    normed = {**error, "norm_patch": True}
    one = torch.ones(())
    return {
        "gather": lambda: gather.gather_patches(volume, ids, dtype=dtype, **whole),
        "gather mirrored": lambda: gather.gather_patches(volume, ids, dtype=dtype, **flipped),
        "gather in a scan": lambda: gather.gather_patches(volume, ids, dtype=dtype, **placed),
        "loss": lambda: loss.masked_reconstruction_loss(pred, volume, ids, **error, **whole),
        "loss mirrored": lambda: loss.masked_reconstruction_loss(pred, volume, ids, **error, **flipped),
        "loss normed": lambda: loss.masked_reconstruction_loss(pred, volume, ids, **normed, **flipped),
        "loss backward": lambda: loss.masked_reconstruction_loss_backward(one, pred, volume, ids, **error, **whole),
        "loss backward mirrored": lambda: loss.masked_reconstruction_loss_backward(
            one, pred, volume, ids, **error, **flipped
        ),
        "loss backward normed": lambda: loss.masked_reconstruction_loss_backward(
            one, pred, volume, ids, **normed, **flipped
        ),
    }


def token_calls(width: int, dtype: torch.dtype, tokens: int = 512, batch: int = 2) -> dict[str, Callable[[], object]]:
    """Unshuffle, whole and in part, and its gradients."""
    shown, chosen = tokens // 4, tokens // 2
    leaves = torch.empty(batch, shown, width, dtype=dtype), torch.zeros(width), torch.zeros(tokens, width)
    ids = torch.zeros(batch, tokens, dtype=torch.int64)
    subset = torch.zeros(batch, chosen, dtype=torch.int64)
    grad = torch.empty(batch, tokens, width, dtype=dtype)
    part = torch.empty(batch, chosen, width, dtype=dtype)
    return {
        "unshuffle": lambda: unshuffle.unshuffle_tokens(*leaves, ids, None),
        "unshuffle subset": lambda: unshuffle.unshuffle_tokens(*leaves, ids, subset),
        "unshuffle backward": lambda: unshuffle.unshuffle_tokens_backward(grad, ids, None, shown),
        "unshuffle backward subset": lambda: unshuffle.unshuffle_tokens_backward(part, ids, subset, shown),
    }


def compile_all(calls: dict[str, Callable[[], object]], architecture: int) -> dict[str, MachineCode]:
    """Compile what each call launches; the loss's last, tiny kernel is left out."""
    codes = {}
    for name, call in calls.items():
        with compiled_for(architecture) as binaries:
            call()
        assert binaries
        for kernel, binary in binaries:
            if kernel != "_finish_kernel":
                codes[f"{name}: {kernel}"] = read(kernel, binary)
    return codes


def spilled(codes: dict[str, MachineCode]) -> list[str]:
    return [name for name, code in codes.items() if code.stack or code.local]


@pytest.fixture(scope="module", params=slow_but(ARCHITECTURES, (90,)))
def codes(request):
    """The machine code of every kernel in the form that training launches: patch 8, width 512, bfloat16."""
    calls = patch_calls(8, torch.bfloat16) | token_calls(512, torch.bfloat16)
    return request.param, compile_all(calls, request.param)


def test_nothing_spills(codes):
    assert spilled(codes[1]) == []


def test_memory_is_met_16_bytes_at_a_time(codes):
    _, found = codes
    for name, code in found.items():
        assert code.loads.get("128", 0) >= 1, (name, code)
        narrow = {"U16", "S16"} & set(code.loads)
        # In a scan an origin may lie anywhere: the narrow loads are for those that are not on a multiple of 8.
        assert bool(narrow) == ("in a scan" in name), (name, code)
        if code.kernel == "_loss_kernel" or name == "unshuffle backward subset: _unshuffle_backward_kernel":
            assert sum(code.stores.values()) <= 2, (name, code)  # sums
        else:
            assert code.stores.get("128", 0) >= 1, (name, code)
            assert not {"U16", "S16"} & set(code.stores), (name, code)


def test_registers_stay_within_the_golden_file(codes):
    architecture, found = codes
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if os.environ.get("MAESIL_RENEW_GOLDEN"):
        golden[str(architecture)] = {name: code.registers for name, code in found.items()}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    allowed = golden[str(architecture)]
    assert set(found) == set(allowed)
    over = {name: code.registers for name, code in found.items() if code.registers > SLACK * allowed[name]}
    assert over == {}


@pytest.mark.parametrize(
    ("patch", "dtype"),
    [
        pytest.param(4, torch.float32, marks=pytest.mark.slow),
        pytest.param(6, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(16, torch.float32, marks=pytest.mark.slow),
        ((4, 8, 8), torch.bfloat16),
    ],
)
def test_other_patches_do_not_spill_either(patch, dtype):
    calls = patch_calls(patch, dtype, edge=96 if patch == 16 else 48)
    names = ("gather mirrored", "loss backward normed")
    assert spilled(compile_all({name: calls[name] for name in names}, 90)) == []


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        pytest.param(384, torch.bfloat16, marks=pytest.mark.slow),
        (33, torch.float16),
        pytest.param(768, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_other_widths_do_not_spill_either(width, dtype):
    codes = compile_all(token_calls(width, dtype), 90)
    assert spilled(codes) == []
    if width % 8 == 0:
        assert all(code.loads.get("128", 0) for code in codes.values())


def table(architecture: int) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(configs.TABLE.read_text(encoding="utf-8"))["architectures"][str(architecture)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_launch_of_the_table_spills_and_all_meet_wide_memory(architecture):
    launches = table(architecture)
    calls = {}
    for voxels in map(int, launches["gather"]):
        patch = round(voxels ** (1 / 3))
        of_patch = patch_calls(patch, torch.bfloat16)
        calls |= {f"{patch}: {name}": of_patch[name] for name in ("gather mirrored", "loss mirrored")}
        calls |= {f"{patch}: {name}": of_patch[name] for name in ("loss backward mirrored",)}
    for width in map(int, launches["unshuffle_forward"]):
        calls |= {f"{width}: {name}": call for name, call in token_calls(width, torch.bfloat16).items()}
    codes = compile_all(calls, architecture)
    assert spilled(codes) == []
    for name, code in codes.items():
        # A row of a patch of 4 has 8 bytes, and so has a thread's part of a row of 128 that is summed: half as wide.
        halves = ("4: gather", "128: unshuffle backward subset: _sum_rows_kernel")
        widest = "64" if name.startswith(halves) else "128"
        assert code.loads.get(widest, 0) >= 1, (name, code)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["base", "large"])
def test_the_table_has_every_launch_of_a_preset_at_batches_1_to_64(preset, monkeypatch):
    asked = set()

    def recorded(operation: str, width: int) -> configs.Launch:
        asked.add((operation, width))
        return configs.launch(operation, width)

    for module in (gather, loss, unshuffle):
        monkeypatch.setattr(module, "launch", recorded)
    model = PRESETS[preset].model
    for batch in (1, 2, 3, 4, 8, 16, 32, 64):
        calls = patch_calls(model.patch, torch.bfloat16, edge=model.crop_zyx[0], batch=batch)
        calls |= token_calls(model.decoder_width, torch.bfloat16, tokens=model.tokens, batch=batch)
        chosen = ("gather mirrored", "loss mirrored", "loss backward mirrored")
        calls = {name: call for name, call in calls.items() if name in chosen or "unshuffle" in name}
        with compiled_for(90) as binaries:
            for call in calls.values():
                call()
        assert spilled({name: read(name, binary) for name, binary in binaries}) == []
    assert {operation for operation, _ in asked} >= {"gather", "loss_forward", "loss_backward", "unshuffle_backward"}
    for architecture in ARCHITECTURES:
        launches = table(architecture)
        assert [one for one in asked if str(one[1]) not in launches.get(one[0], {})] == []
