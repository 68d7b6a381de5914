"""The command line: thin commands, errors mapped to exit codes in one place.

Heavy packages are imported inside the commands only, so that ``maesil --help`` answers at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from maesil import cli_cache, cli_doctor, cli_ingest, cli_use
from maesil.cli_ingest import print_all
from maesil.errors import (
    DISK_FULL,
    EXIT_INTERRUPTED,
    EXIT_RESOURCES,
    EXIT_STORE,
    EXIT_USAGE,
    NOT_ALLOWED,
    EndedWithOthers,
    MaesilError,
    UsageError,
)


class _ErrorMapping(TyperGroup):
    """Ends every foreseen error with one line on standard error and its documented exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EndedWithOthers as error:
            raise typer.Exit(error.exit_code) from error
        except MaesilError as error:
            _end(f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            _end("interrupted; the same command goes on where it stopped (train: with --resume)", EXIT_INTERRUPTED)
        except OSError as error:
            if error.errno in DISK_FULL:
                _end("error: the disk is full; free space and run the same command again", EXIT_RESOURCES)
            if error.errno in NOT_ALLOWED:
                _end(f"error: {error.filename}: expected to be allowed to use it, found: {error.strerror}", EXIT_USAGE)
            raise


def _end(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=_ErrorMapping,
    name="maesil",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From folders of CT to a pre-trained 3D masked autoencoder.\n\n"
    "Start with `maesil demo`, or: maesil ingest SCANS --out store.zarr; maesil train store.zarr --out run; "
    "maesil evaluate run store.zarr",
)
store_app = typer.Typer(no_args_is_help=True, help="Look into a store, check it, take volumes out of it.")
app.add_typer(store_app, name="store")
experiment_app = typer.Typer(no_args_is_help=True, help="Whole experiments: train, score and compare several models.")
app.add_typer(experiment_app, name="experiment")
app.add_typer(cli_cache.app, name="cache")
cli_ingest.register(app, store_app)
cli_use.register(app)
cli_doctor.register(app)

StorePath = Annotated[
    str, typer.Argument(metavar="STORE", help="A store made by `maesil ingest`: its path, or its name in the cache.")
]
LpipsWeights = Annotated[Path | None, typer.Option(help="torchvision's alexnet-owt-7be5be79.pth: score LPIPS as well.")]
WHERE = "Only what a filter takes, such as 'body > 0.3 and spacing_z <= 2' (docs/how-to/cache.md lists the columns)."
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    command, ranks = context.invoked_subcommand, os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and ranks != "1" and command not in (None, "train", "doctor"):
        raise UsageError(f"maesil {command}: started by {ranks} ranks, expected one process; only train takes several")
    if version:
        from maesil import __version__

        typer.echo(__version__)
        raise typer.Exit


def _open(store: str) -> Any:
    from maesil.cache.catalogue import find_store
    from maesil.store import Store

    return Store.open(find_store(store))


@store_app.command("info")
def store_info(store: StorePath, where: Annotated[str, typer.Option(help=WHERE)] = "", as_json: AsJson = False) -> None:
    """Summarise a store: recipe, volumes, patients, superpatches, size.

    Example: maesil store info store.zarr
    """
    from maesil.store_info import describe, tables

    opened = _open(store)
    if as_json:
        typer.echo(json.dumps(describe(opened, where), indent=1))
    else:
        print_all(*tables(opened, where))


@store_app.command("verify")
def store_verify(store: StorePath, as_json: AsJson = False) -> None:
    """Read and check every superpatch and map; exit code 4 if anything is damaged.

    Example: maesil store verify store.zarr
    """
    from maesil.progress import progress
    from maesil.verify import verify

    opened = _open(store)
    with progress({"verify": "volumes"}) as report:
        verified = verify(opened, lambda done, total: report("verify", done, total))
    if as_json:
        typer.echo(json.dumps(asdict(verified), indent=1))
    else:
        for problem in verified.problems:
            typer.echo(f"damaged: {problem}")
        found = f"{len(verified.problems)} problems found" if verified.problems else "all intact"
        typer.echo(f"{verified.volumes} volumes, {verified.superpatches} superpatches: {found}")
    if verified.problems:
        raise typer.Exit(EXIT_STORE)


@store_app.command("export")
def store_export(
    store: StorePath,
    out: Annotated[Path, typer.Option(help="Folder for the NIfTI files.")],
    volume_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[VOLUME_ID]...", help="Default: all volumes.")
    ] = None,
) -> None:
    """Write volumes as NIfTI (VOLUME_ID.nii.gz, int16 HU), every voxel where it was in the patient.

    Example: maesil store export store.zarr --out nifti 1882660a
    """
    from maesil.cache.reader import SuperpatchReader
    from maesil.nifti_export import export_volume

    opened = _open(store)
    wanted = [opened.volume(name) for name in volume_ids] if volume_ids else opened.volumes()
    reader = SuperpatchReader(opened)
    for volume in wanted:
        typer.echo(str(export_volume(reader, volume.volume_id, out)))


@store_app.command("index")
def store_index(store: StorePath) -> None:
    """Make the Parquet tables of a store anew from its commits.

    Example: maesil store index store.zarr
    """
    from maesil.index import write_index

    volumes, superpatches = write_index(_open(store))
    typer.echo(f"indexed {volumes} volumes, {superpatches} superpatches")


@store_app.command("gc")
def store_gc(
    store: StorePath,
    older_than: Annotated[float, typer.Option(min=0, help="Hours that nothing has touched it.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
) -> None:
    """Remove what no volume needs: attempts replaced or never committed, and files left by killed processes.

    Example: maesil store gc store.zarr --dry-run
    """
    from maesil.store_gc import find_garbage, remove_garbage

    opened = _open(store)
    found = find_garbage(opened, older_than)
    for garbage in found:
        typer.echo(f"{garbage.key} ({garbage.bytes / 1e6:.1f} MB): {garbage.why}")
        if not dry_run:
            remove_garbage(opened, garbage)
    freed = sum(garbage.bytes for garbage in found) / 1e6
    typer.echo(f"{len(found)} pieces, {freed:.1f} MB {'to be freed' if dry_run else 'freed'}")


@store_app.command("split")
def store_split(
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="Stores: paths or names in the cache.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    shares: Annotated[str, typer.Option(help="Of training, validation and test patients.")] = "0.8,0.1,0.1",
    seed: Annotated[int, typer.Option(help="Who falls where.")] = 0,
) -> None:
    """Split the patients of stores by hash and freeze the split to a file; copies of one scan stay together.

    Example: maesil store split store.zarr --out split.json --shares 0.8,0.1,0.1
    """
    from maesil.same_scan import patients
    from maesil.split import PARTS, parse_shares, split_by_shares, write_split

    opened = [_open(store) for store in stores]
    leaders = patients(opened)
    split = split_by_shares(leaders, parse_shares(shares), seed)
    write_split(out, split, [store.fingerprint for store in opened])
    counts = (f"{len({leaders[group] for group in getattr(split, part)})} {part}" for part in PARTS)
    typer.echo(f"{out}: patients: {', '.join(counts)}; use it with maesil train --split {out}")


@app.command()
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
    ram: Annotated[str | None, typer.Option(help="Memory for superpatches that were read: auto, or 8GB.")] = None,
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
    from maesil.config_file import load_config
    from maesil.ranks import joined
    from maesil.train import train as run_training

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


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of `maesil train`.")],
    store: StorePath,
    out: Annotated[Path | None, typer.Option(help="Folder for table and pictures (default: RUN/evaluation).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the rows as JSON.")] = None,
    volumes: Annotated[list[str] | None, typer.Option(help="Volume ids, or 'all'; default: held-out patients.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the masks.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    where: Annotated[str, typer.Option(help=WHERE)] = "",
    split: Annotated[Path | None, typer.Option(help="Score the test patients of a file of `store split`.")] = None,
    lpips_weights: LpipsWeights = None,
) -> None:
    """Score a run beside two floors (mean, interpolation) on volumes it was not trained on.

    Example: maesil evaluate run store.zarr --json scores.json
    """
    from maesil.cache.catalogue import find_store
    from maesil.evaluate import evaluate as run_evaluation

    report = run_evaluation(
        run,
        find_store(store),
        out=out,
        json_path=json_path,
        seed=seed,
        device=device,
        volumes=volumes,
        where=where,
        split_file=split,
        lpips_weights=lpips_weights,
    )
    print_all(report.table())


@experiment_app.command("paper")
def experiment_paper(
    stores: Annotated[
        list[str],
        typer.Option(
            "--store", help="A store: its path, or its name in the cache. May be repeated; three patients at least."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for runs, tables, curves and pictures.")],
    budget: Annotated[str, typer.Option(help="tiny (30 minutes on 2 CPU cores), h100-10min or paper.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of split, weights, masks and scores.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    models: Annotated[list[str] | None, typer.Option(help="Only these models (default: all).")] = None,
    lpips_weights: LpipsWeights = None,
) -> None:
    """Train and score MAESIL, AE, VAE, VQ-VAE and a 2D masked autoencoder alike; write the tables.

    Finished models are not trained again: the same command goes on where it stopped.

    Example: maesil experiment paper --store store.zarr --out paper --budget tiny
    """
    from maesil.cache.catalogue import find_store
    from maesil.experiment import MODELS, Budget, run_paper_experiment

    run_paper_experiment(
        [find_store(store) for store in stores],
        out,
        Budget.load(budget),
        seed=seed,
        device=device,
        models=models or MODELS,
        lpips_weights=lpips_weights,
    )
    typer.echo((out / "tables.md").read_text(encoding="utf-8"))
    typer.echo(f"page: {out / 'index.html'}")


@app.command()
def reconstruct(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of `maesil train`.")],
    store: StorePath,
    volume: Annotated[str, typer.Argument(metavar="VOLUME", help="A volume id, or a beginning of it that is unique.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for NIfTI and picture (default: RUN/reconstruction).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the masks.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Predict every voxel of a volume while it is hidden; write NIfTI beside the original, and a picture.

    Example: maesil reconstruct run store.zarr 1882660a --out reconstruction
    """
    from maesil.cache.catalogue import find_store
    from maesil.reconstruct import reconstruct_volume

    result = reconstruct_volume(run, find_store(store), volume, out=out, seed=seed, device=device)
    lo, hi = result.window
    print_all(f"PSNR {result.psnr:.2f} dB over the valid voxels of the body, window {lo:g} to {hi:g} HU", *result.notes)
    print_all(*map(str, (result.original, result.reconstruction, result.picture)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
) -> None:
    """Run the whole path on a generated study: ingest, train, evaluate; a few minutes on a CPU.

    Example: maesil demo --out demo
    """
    from maesil.demo import run_demo

    run_demo(out)


def main() -> None:
    """Run the command line."""
    app()
