"""``maesil evaluate``, ``maesil reconstruct`` and ``maesil experiment``: scores and pictures.

Heavy packages are imported inside the commands only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maesil.cli.options import WHERE, Device, RunPath, StoreName, found
from maesil.cli.output import print_all

if TYPE_CHECKING:
    from maesil.evaluation.scores import Report

experiment_app = typer.Typer(no_args_is_help=True, help="Whole experiments: train, score and compare several models.")
LpipsWeights = Annotated[Path | None, typer.Option(help="torchvision's alexnet-owt-7be5be79.pth: score LPIPS as well.")]


def evaluate(
    run: RunPath,
    store: StoreName,
    out: Annotated[Path | None, typer.Option(help="Folder for table and pictures (default: RUN/evaluation).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write the rows as JSON.")] = None,
    volumes: Annotated[list[str] | None, typer.Option(help="Volume ids, or 'all'; default: held-out patients.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the masks.")] = 0,
    device: Device = "auto",
    where: Annotated[str, typer.Option(help=WHERE)] = "",
    split: Annotated[Path | None, typer.Option(help="Score the test patients of a file of `store split`.")] = None,
    lpips_weights: LpipsWeights = None,
) -> None:
    """Score a run beside two naive baselines (mean, interpolation) on volumes it was not trained on.

    Example: maesil evaluate run store.zarr --json scores.json
    """
    from maesil.evaluation.evaluate import evaluate as run_evaluation

    report = run_evaluation(
        run,
        found(store),
        out=out,
        json_path=json_path,
        seed=seed,
        device=device,
        volumes=volumes,
        where=where,
        split_file=split,
        lpips_weights=lpips_weights,
    )
    print_all(report.table(), _meaning(report), f"results: {out or run / 'evaluation'}: scores.json and pictures")


def _meaning(report: Report) -> str:
    """Return in one sentence what the table says of the model."""
    full = report.facts["mask"] == "none"
    body = [row for row in report.rows if row["region"] == "body"]
    scores = {row["model"]: row["psnr_whole"] if full else row["psnr_hidden"] for row in body}
    naive = scores.pop("interpolation", None)
    scores.pop("mean", None)
    found = next(iter(scores.values()), None)
    if found is None or naive is None:
        return "a higher PSNR is better; there is nothing to compare it with here"
    better = "better than" if found > naive else "no better than"
    return (
        f"the model predicts hidden voxels of the body at {found:.2f} dB, {better} interpolating the visible ones "
        f"({naive:.2f} dB; higher is better)"
    )


def reconstruct(
    run: RunPath,
    store: StoreName,
    volume: Annotated[str, typer.Argument(metavar="VOLUME", help="A volume id, or a beginning of it that is unique.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for NIfTI and picture (default: RUN/reconstruction).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the masks.")] = 0,
    device: Device = "auto",
) -> None:
    """Predict every voxel of a volume while it is hidden; write NIfTI beside the original, and a picture.

    Example: maesil reconstruct run store.zarr 1882660a --out reconstruction
    """
    from maesil.evaluation.reconstruct import reconstruct_volume

    result = reconstruct_volume(run, found(store), volume, out=out, seed=seed, device=device)
    lo, hi = result.window
    print_all(f"PSNR {result.psnr:.2f} dB over the valid voxels of the body, window {lo:g} to {hi:g} HU", *result.notes)
    print_all(*map(str, (result.original, result.reconstruction, result.picture)))


@experiment_app.command("paper")
def experiment_paper(
    stores: Annotated[
        list[str],
        typer.Option(
            "--store", help="A store: its path, or its name in the cache. May be repeated; three patients at least."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for runs, tables, curves and pictures.")],
    budget: Annotated[
        str, typer.Option(help="tiny (30 minutes on 2 CPU cores), cpu-2h, cpu-night, h100-10min or paper.")
    ] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of split, weights, masks and scores.")] = 0,
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Run N seeds from --seed on, and write tables of their means.")
    ] = 1,
    device: Device = "auto",
    models: Annotated[list[str] | None, typer.Option(help="Only these models (default: all).")] = None,
    tables: Annotated[list[str] | None, typer.Option("--table", metavar="A|B", help="Only this table.")] = None,
    split: Annotated[
        Path | None, typer.Option(help="Frozen split with train, validation and test, see `maesil store split`.")
    ] = None,
    lpips_weights: LpipsWeights = None,
) -> None:
    """Train and score MAESIL, AE, VAE, VQ-VAE and a 2D masked autoencoder alike; write the tables.

    Finished models are not trained again: the same command goes on where it stopped.

    Example: maesil experiment paper --store store.zarr --out paper --budget tiny
    """
    from maesil.config.schema import PAPER_KINDS
    from maesil.evaluation.experiment import TABLES, ExperimentBudget, run_paper_experiment
    from maesil.evaluation.seeds import run_with_seeds

    given = ([found(store) for store in stores], out, ExperimentBudget.load(budget))
    options: dict[str, Any] = {
        "device": device,
        "models": models or PAPER_KINDS,
        "tables": tables or tuple(TABLES),
        "split_file": split,
        "lpips_weights": lpips_weights,
    }
    if seeds == 1:
        run_paper_experiment(*given, seed=seed, **options)
    else:
        run_with_seeds(*given, range(seed, seed + seeds), **options)
    typer.echo((out / "tables.md").read_text(encoding="utf-8"))
    typer.echo(f"page: {out / 'index.html'}")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(evaluate)
    app.command()(reconstruct)
    app.add_typer(experiment_app, name="experiment")
