"""``maesil train``.

Heavy packages are imported inside the commands only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from maesil.cli.options import WHERE, words_of
from maesil.errors import UsageError
from maesil.text import counted

if TYPE_CHECKING:
    from maesil.training.train import TrainSummary

_GO_ON = "from the checkpoint"
"""The value of ``--resume`` by itself."""


def train(
    stores: Annotated[
        list[str],
        typer.Argument(metavar="STORE[=WEIGHT]...", help="Stores: paths or names in the cache; the share each gives."),
    ],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoint, metrics, pictures.")],
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=words_of("maesil.config.presets", "PRESETS"),
            help="tiny, small, base, large, or primus-s, -b, -m, -l (default: by the device and the store; "
            "of a resumed run: its own).",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with [model], [mask] and [train].")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.NAME=VALUE, e.g. train.lr=1e-3.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps (default: the preset's).")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order, masks and augmentation.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of the patients held out; 0 holds out none.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    kernels: Annotated[str | None, typer.Option(help="auto, reference or triton (default: auto).")] = None,
    ram: Annotated[str | None, typer.Option(help="Memory for superpatches read: auto, or a size such as 8GB.")] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="DIR", help="Keep superpatches of stores far away here, on a disk.")
    ] = None,
    stage_size: Annotated[str | None, typer.Option(metavar="SIZE", help="What DIR may take (default: 200GB).")] = None,
    device_resident: Annotated[
        bool | None, typer.Option("--device-resident", help="Keep the training scans themselves on the device.")
    ] = None,
    where: Annotated[str | None, typer.Option(help=WHERE)] = None,
    split: Annotated[Path | None, typer.Option(help="Who is trained on and held out: a file of `store split`.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[auto]",
            help="Go on from the checkpoint in --out; `--resume auto` begins where there is none.",
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN|ENCODER", help="Begin a new run with the weights of a run, or of an exported encoder."
        ),
    ] = None,
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", help="Copy the run there after each checkpoint; --resume finds it.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Trace a few steps into RUN/profile.")] = False,
) -> None:
    """Pre-train a 3D masked autoencoder from stores; under torchrun, by several processes.

    Example: maesil train store.zarr --preset tiny --device cpu --out run
    """
    from maesil.cache.catalogue import find_stores
    from maesil.config.toml import asked_for, load_config
    from maesil.devices import pick_device
    from maesil.distributed import joined
    from maesil.downstream.card import is_export
    from maesil.downstream.export import load_net
    from maesil.store.urls import place_of
    from maesil.training.choose import starting_point
    from maesil.training.mirror import bring_back
    from maesil.training.train import train as run_training

    if resume not in (None, _GO_ON, "auto"):
        raise UsageError(f"--resume: expected nothing more, or auto, found {resume!r}")
    options = _as_set(
        overrides, steps=steps, batch=batch, seed=seed, validation=validation, device=device, kernels=kernels, ram=ram,
        device_resident=device_resident, where=where, stage=stage, stage_size=stage_size,
    )  # fmt: skip
    with joined() as ranks:  # before anything can fail, so that it is told once
        paths, weights = find_stores(stores)
        mirrored = None if mirror is None else place_of(mirror)
        # Its configuration is what a run that goes on starts from.
        back = ranks.from_first(lambda: bring_back(mirrored, out, resume=resume is not None) if mirrored else "")
        asked = asked_for(config, options)
        on = pick_device(str(asked.get("train", {}).get("device", "auto")), ranks)
        base, why = starting_point(paths, out, on, resume=resume is not None)
        chosen = load_config(preset, config, options, base)
        if chosen.train.minutes and steps is not None:
            raise UsageError("--steps and train.minutes: expected one of the two, since minutes set the steps")
        begin_with = init_from if init_from is None or not is_export(init_from) else load_net(init_from)
        summary = run_training(
            paths, chosen, out, resume="auto" if resume == "auto" else resume is not None, split=split,
            weights=weights, init_from=begin_with, profile=profile, mirror=mirrored,
            note=back or ("" if preset or config else why),
        )  # fmt: skip
    if ranks.first:
        typer.echo(_told(summary, str(out), stores[0].rpartition("=")[0] if weights else stores[0]))


def _as_set(overrides: list[str] | None, **given: object) -> list[str]:
    """Return the values of ``--set``, and the options that were given as further ones."""
    from maesil.config.toml import toml_value

    more = (f"train.{name}={toml_value(value)}" for name, value in given.items() if value is not None)
    return [*(overrides or ()), *more]


def _told(summary: TrainSummary, out: str, store: str) -> str:
    """Return what was done, and what to do next: nobody can be scored where nobody was held out."""
    nothing = summary.begun_at == summary.steps
    done = f"{counted(summary.steps - summary.begun_at, 'step')} in {summary.seconds:.0f} s"
    if nothing:
        done = f"{counted(summary.steps, 'step')} done before, nothing was left to do"
    elif summary.begun_at:
        done += f", {summary.steps} in all"
    export = f"maesil export {out} --out encoder (nobody was held out: evaluate on a store of other patients)"
    return f"{out}: {done}; next: {f'maesil evaluate {out} {store}' if summary.held_out else export}"


class _ResumeAlone(TyperCommand):
    """Lets ``--resume`` stand alone or before ``auto``; options of this command line take one value or none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give ``--resume`` its value."""
        given: list[str] = []
        for word in args:
            if given and given[-1] == "--resume" and word == "auto":
                given[-1] = "--resume=auto"
            else:
                given.append(word)
        return super().parse_args(ctx, [f"--resume={_GO_ON}" if word == "--resume" else word for word in given])


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(cls=_ResumeAlone)(train)
