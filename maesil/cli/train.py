"""``maesil train``.

Heavy packages are imported inside the commands only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from maesil.cli.options import WHERE


def train(
    stores: Annotated[
        list[str],
        typer.Argument(metavar="STORE[=WEIGHT]...", help="Stores: paths or names in the cache; the share each gives."),
    ],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoint, metrics, pictures.")],
    preset: Annotated[str | None, typer.Option(help="tiny, small, base or large (default: base).")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with [model], [mask] and [train].")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.NAME=VALUE, e.g. train.lr=1e-3.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps (default: the preset's).")] = None,
    batch: Annotated[int | None, typer.Option(help="Superpatches a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order, masks and augmentation.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of the patients held out; 0 holds out none.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    kernels: Annotated[str | None, typer.Option(help="auto, reference or triton (default: auto).")] = None,
    ram: Annotated[str | None, typer.Option(help="Memory for superpatches read: auto, or a size such as 8GB.")] = None,
    device_resident: Annotated[
        bool | None, typer.Option("--device-resident", help="Keep the training scans themselves on the device.")
    ] = None,
    where: Annotated[str | None, typer.Option(help=WHERE)] = None,
    split: Annotated[Path | None, typer.Option(help="Who is trained on and held out: a file of `store split`.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Trace a few steps into RUN/profile.")] = False,
) -> None:
    """Pre-train a 3D masked autoencoder from stores; under torchrun, by several processes.

    Example: maesil train store.zarr --preset tiny --device cpu --out run
    """
    from maesil.cache.catalogue import find_stores
    from maesil.config.toml import load_config
    from maesil.distributed import joined
    from maesil.training.train import train as run_training

    given = {
        "steps": steps, "batch": batch, "seed": seed, "validation": validation, "device": device, "kernels": kernels,
        "ram": None if ram is None else json.dumps(ram), "device_resident": "true" if device_resident else None,
        "where": None if where is None else json.dumps(where),
    }  # fmt: skip
    options = [*(overrides or ()), *(f"train.{name}={value}" for name, value in given.items() if value is not None)]
    with joined() as ranks:  # before anything can fail, so that it is told once
        paths, weights = find_stores(stores)
        chosen = load_config(preset, config, options)
        summary = run_training(paths, chosen, out, resume=resume, split=split, weights=weights, profile=profile)
    if ranks.first:
        typer.echo(f"{out}: {summary.steps} steps in {summary.seconds:.0f} s; next: maesil evaluate {out} {paths[0]}")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(train)
