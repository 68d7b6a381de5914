"""Make ``kernels/launch_table.json``: the launch settings of every kernel, by architecture and shape.

    python tests/benchmarks/tune_kernels.py [--minutes 5]    # on a GPU: measure, and write its architecture's part
    python tests/benchmarks/tune_kernels.py --by-rule    # anywhere: write what the rule says for all architectures

Needs torch and triton only, and the repository's root on PYTHONPATH. Each candidate runs the operation on inputs larger
than the L2 cache in a CUDA graph; the fastest median wins. The table is written after every shape, those of the presets
first; shapes that were measured on the same GPU and versions are left as they are, so the same command goes on where
it stopped, or where ``--minutes`` ended it. Shapes not measured yet keep the rule's settings; ``made_by`` says which.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from maesil.kernels import configs, gather, loss, unshuffle
from maesil.kernels.configs import TABLE, Launch, by_rule

ARCHITECTURES = ("80", "90", "100")
PATCHES = (8, 4, 16)
WIDTHS = (384, 512, 256, 128, 192, 768)
BY_PATCH, BY_WIDTH = ("gather", "loss_forward", "loss_backward"), (
    "unshuffle_forward", "unshuffle_backward", "unshuffle_subset",
)  # fmt: skip
BATCH, EDGE = 16, 128


def shapes() -> Iterator[tuple[str, int]]:
    """Every operation with every width the table names, those of the presets base, large and small first."""
    found = [
        *((place, name, patch**3) for place, patch in enumerate(PATCHES) for name in BY_PATCH),
        *((place / 2, name, width) for place, width in enumerate(WIDTHS) for name in BY_WIDTH),
    ]
    for _, operation, width in sorted(found, key=lambda one: one[0]):
        yield operation, width


def candidates(operation: str, width: int) -> list[Launch]:
    """The settings worth a try: around the rule's, in powers of two."""
    rule = by_rule(operation, width)
    if operation == "unshuffle_subset":
        return [Launch(1, rule.columns, warps) for warps in (1, 2, 4)]
    steps = (1, 2, 4, 8, 16) if operation == "unshuffle_backward" else (1,)
    values = (1024, 2048, 4096, 8192, 16384)
    made = itertools.product(values, (2, 4, 8), steps)
    found = [Launch(max(1, n // rule.columns), rule.columns, warps, step) for n, warps, step in made]
    return list(dict.fromkeys(launch for launch in found if launch.rows * launch.columns // launch.warps <= 4096))


def call(operation: str, width: int) -> Callable[[], object]:
    """Prepare one call of an operation, on bfloat16 tokens and inputs that no cache holds."""
    device = "cuda"
    if operation in BY_PATCH:
        patch = round(width ** (1 / 3))
        tokens = (EDGE // patch) ** 3
        volume = torch.randint(-1024, 3072, (BATCH, EDGE, EDGE, EDGE), device=device).short()
        ids = torch.stack([torch.randperm(tokens, device=device) for _ in range(BATCH)])
        visible, hidden = ids[:, : tokens // 4].contiguous(), ids[:, tokens // 4 :].contiguous()
        lookup = {
            "patch_size": patch, "window": (-1000.0, 1000.0), "mean": 0.3, "std": 0.2, "origin": None, "size": None,
            "flip": torch.rand(BATCH, 3, device=device) < 0.5,
        }  # fmt: skip
        if operation == "gather":
            return lambda: gather.gather_patches(volume, visible, dtype=torch.bfloat16, **lookup)
        pred = torch.randn(*hidden.shape, width, device=device, dtype=torch.bfloat16)
        options = {"norm_patch": False, "eps": 1e-6, "weight": torch.rand(hidden.shape, device=device), **lookup}
        if operation == "loss_forward":
            return lambda: loss.masked_reconstruction_loss(pred, volume, hidden, **options)
        grad = torch.ones((), device=device)
        return lambda: loss.masked_reconstruction_loss_backward(grad, pred, volume, hidden, **options)
    tokens = 4096
    ids_restore = torch.stack([torch.randperm(tokens, device=device) for _ in range(BATCH)])
    subset = ids_restore[:, : tokens // 2].contiguous()
    leaves = (
        torch.randn(BATCH, tokens // 4, width, device=device, dtype=torch.bfloat16),
        torch.randn(width, device=device),
        torch.randn(tokens, width, device=device),
    )
    grad = torch.randn(BATCH, tokens, width, device=device, dtype=torch.bfloat16)
    if operation == "unshuffle_forward":
        return lambda: unshuffle.unshuffle_tokens(*leaves, ids_restore, None)
    if operation == "unshuffle_backward":
        return lambda: unshuffle.unshuffle_tokens_backward(grad, ids_restore, None, tokens // 4)
    return lambda: unshuffle.unshuffle_positions_backward(grad[:, : tokens // 2].contiguous(), subset, tokens)


def measure(operation: str, width: int) -> Launch:
    """Return the fastest candidate."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench_cudagraph

    run = call(operation, width)
    seconds = {}
    for candidate in candidates(operation, width):

        def launch(name: str, size: int, chosen: Launch = candidate) -> Launch:
            return chosen if name == operation else configs.launch(name, size)

        with contextlib.ExitStack() as stack:
            for module in (gather, loss, unshuffle):
                stack.enter_context(mock.patch.object(module, "launch", launch))
            with contextlib.suppress(OutOfResources):  # no launch for this GPU
                seconds[candidate] = do_bench_cudagraph(run, rep=50, return_mode="median")
    best = min(seconds, key=seconds.__getitem__)
    print(f"{operation:20} {width:5} {best} {1e3 * seconds[best]:8.1f} us", flush=True)
    return best


def read(path: Path = TABLE) -> dict[str, Any]:
    """Read the table, or begin one."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"made_by": {}, "measured": {}, "architectures": {}}


def write(document: dict[str, Any], path: Path = TABLE) -> None:
    """Write the table whole, one line a launch."""
    text = json.dumps(document, indent=1)
    text = re.sub(r"\{\s+(\"rows[^}]+?)\s+\}", lambda found: "{" + re.sub(r"\s+", " ", found[1]) + "}", text)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def set_by_rule(document: dict[str, Any], architecture: str) -> None:
    """Give every shape of an architecture the rule's settings."""
    launches: dict[str, dict[str, dict[str, int]]] = {}
    for operation, width in shapes():
        launches.setdefault(operation, {})[str(width)] = asdict(by_rule(operation, width))
    document["architectures"][architecture] = launches
    document["made_by"][architecture] = "rule, not measured"
    document.setdefault("measured", {}).pop(architecture, None)


def tune(
    architecture: str,
    machine: str,
    measure: Callable[[str, int], Launch],
    seconds: float = math.inf,
    path: Path = TABLE,
) -> int:
    """Measure the shapes of an architecture that were not measured on this machine yet, for so long; return how many.

    The table is written after each.
    """
    document, started, done = read(path), time.monotonic(), 0
    known = document.setdefault("measured", {}).get(architecture, {})
    if known.get("on") != machine:
        set_by_rule(document, architecture)
        known = document["measured"][architecture] = {"on": machine, "shapes": []}
    for operation, width in shapes():
        if f"{operation} {width}" in known["shapes"]:
            continue
        if time.monotonic() - started >= seconds:
            break
        document["architectures"][architecture][operation][str(width)] = asdict(measure(operation, width))
        known["shapes"].append(f"{operation} {width}")
        told, of = len(known["shapes"]), len(list(shapes()))
        rest = "" if told == of else f"; {of - told} of {of} shapes by the rule"
        document["made_by"][architecture] = f"measured on {machine}{rest}"
        write(document, path)
        done += 1
    return done


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by-rule", action="store_true", help="write the rule's settings, measure nothing")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no shape after so long")
    asked = parser.parse_args()
    if asked.by_rule:
        document = read()
        for architecture in ARCHITECTURES:
            set_by_rule(document, architecture)
        write(document)
        return
    if not torch.cuda.is_available():
        raise SystemExit("tune_kernels.py: expected a CUDA GPU, torch sees none; --by-rule needs none")
    major, minor = torch.cuda.get_device_capability()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    done = tune(f"{major}{minor}", machine, measure, 60 * asked.minutes)
    print(f"{done} shapes measured; {read()['made_by'][f'{major}{minor}']}")


if __name__ == "__main__":
    main()
