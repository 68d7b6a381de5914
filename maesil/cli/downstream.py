"""Commands that use what was trained: ``export``, ``features``, ``probe``, ``finetune``, ``prove`` and others.

Heavy packages are imported inside the commands only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from maesil.cli.options import AsJson, Device, RunPath, StoreName, found, words_of
from maesil.cli.output import print_all
from maesil.errors import EXIT_REFUSED
from maesil.text import counted, printable

LabelFolder = Annotated[
    Path, typer.Option(help="Folder of VOLUME_ID.nii.gz or VOLUME_ID/CLASS.nii.gz; or one file, for a single volume.")
]
Classes = Annotated[list[str] | None, typer.Option(help="Only this class; may be repeated (default: all).")]
IncludeTrained = Annotated[
    bool, typer.Option("--include-trained", help="Score patients that an encoder was trained on, too.")
]


def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Folder for weights and card.")],
    stores: Annotated[
        list[Path] | None,
        typer.Option("--store", help="A store it was trained on: only for runs that keep no recipe; may be repeated."),
    ] = None,
    licence: Annotated[str, typer.Option(help="Terms of the weights, said on the card as they are.")] = "",
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="maesil|nnunet|pt2|monai-bundle",
            help="Written besides; nnunet: files for nnU-Net (primus only); pt2: a program for PyTorch alone; "
            "monai-bundle: a bundle that MONAI runs.",
            autocompletion=words_of("maesil.downstream.export", "FORMATS"),
        ),
    ] = "maesil",
    force: Annotated[bool, typer.Option("--force", help="Replace an encoder that was exported there before.")] = False,
    push: Annotated[
        str, typer.Option(metavar="USER/NAME", help="Upload it to the Hugging Face Hub, too (pip install maesil[hub]).")
    ] = "",
) -> None:
    """Hand the encoder of a run on: weights (safetensors) and a card, for maesil, PyTorch, MONAI and nnU-Net.

    Example: maesil export run --out encoder --licence "CC BY 4.0"
    """
    from maesil.downstream.bundle import INFERENCE
    from maesil.downstream.export import export_encoder
    from maesil.downstream.nnunet import CHECKPOINT, PLAN
    from maesil.downstream.program import PROGRAM

    export_encoder(run, out, stores=stores or (), licence=licence, force=force, kind=kind)
    written, then = {
        "maesil": ("model.safetensors, config.json, README.md", f"maesil.load_encoder({str(out)!r})"),
        "nnunet": (f"{CHECKPOINT}, {PLAN}, config.json", f"nnUNetv2_preprocess_like_nnssl -pc {out / CHECKPOINT}"),
        "pt2": (f"{PROGRAM}, config.json", f"torch.export.load({str(out / PROGRAM)!r}).module()"),
        "monai-bundle": ("configs, models, docs", f"cd {out} && python -m monai.bundle run --config_file {INFERENCE}"),
    }[kind]
    typer.echo(f"{out}: {written}; next: {then}")
    if push:
        from maesil.downstream.hub import push as push_to_hub

        typer.echo(f"{push_to_hub(out, push)}; next: maesil.load_encoder({push!r})")


def nnunet_plan(
    plans: Annotated[Path, typer.Argument(metavar="PLANS.json", help="A plans file of nnU-Net; it is changed.")],
    encoder: Annotated[Path, typer.Option(help="Folder of `maesil export`, or a run.")],
) -> None:
    """Write an encoder's window, mean and deviation into a plan of nnU-Net, so that it sees what it learnt.

    The plan gets CTNormalization, fixed numbers and a new data identifier. Preprocess again afterwards.

    Example: maesil nnunet-plan ptPlans__maesil.json --encoder encoder
    """
    from maesil.downstream.features import open_encoder, spacing_of_training
    from maesil.downstream.nnunet import change_plan

    changed = change_plan(plans, open_encoder(encoder), spacing_of_training(encoder))
    for line in changed.changes or ("nothing to change: it has the numbers of this encoder already",):
        typer.echo(line)
    for note in changed.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"next: nnUNetv2_preprocess -d DATASET -plans_name {plans.stem} -c {' '.join(changed.configurations)}")


def features(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a folder of `maesil export`.")],
    place: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A store (path, URL or name in the cache), or scans (folder, file or URL)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The Parquet file to write.")],
    per: Annotated[
        str,
        typer.Option(
            metavar="scan|superpatch|token",
            help="What a row is.",
            autocompletion=words_of("maesil.downstream.features", "PER"),
        ),
    ] = "superpatch",
    device: Device = "auto",
) -> None:
    """Write embeddings: one per scan, per superpatch (tokens weighted by their share of body) or per token.

    Scans that are not in a store are read by the rules of ingest, at the spacing that the encoder was trained on. The
    same command goes on after an interruption.

    Example: maesil features run store.zarr --out features.parquet
    """
    from maesil.cache.provenance import notes_on_spacing
    from maesil.downstream.features import write_features
    from maesil.store.store import Store, is_store

    source = Path(place) if Path(place).exists() else found(place)
    if is_store(source):
        for note in notes_on_spacing(run, Store.open(source)):
            typer.echo(note, err=True)
    written = write_features(run, source, out, per=per, device=device)
    rows = counted(written.rows, per, "superpatches" if per == "superpatch" else "")
    typer.echo(f"{out}: {rows} of {counted(written.scans, 'scan')}")
    for path, code in sorted(written.refused.items()):
        typer.echo(f"{printable(path)}: refused ({code}), not in the table", err=True)
    if written.refused:
        raise typer.Exit(EXIT_REFUSED)


def probe(
    run: RunPath,
    store: StoreName,
    labels: LabelFolder,
    against: Annotated[
        list[Path] | None, typer.Option(help="Another run to compare with, such as an AE; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for probe.json (default: RUN/probe).")] = None,
    classes: Classes = None,
    folds: Annotated[int, typer.Option(help="Folds by patient, at most.", min=2)] = 5,
    patches: Annotated[
        int, typer.Option(help="At most this many patches, equally many from each volume.", min=1)
    ] = 100_000,
    seed: Annotated[int, typer.Option(help="Seed of folds, patches and untrained weights.")] = 0,
    include_trained: IncludeTrained = False,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Ask the frozen encoder by linear regression what is in a patch, beside an untrained one and the bare voxels.

    Labels are files named after volume ids, see `maesil link-labels`.

    Example: maesil probe run store.zarr --labels labels --against run_ae
    """
    from maesil.downstream.probe import probe as run_probe

    report = run_probe(
        run, found(store), labels, out=out, against=against or (), classes=classes or (), folds=folds, patches=patches,
        seed=seed, device=device, include_trained=include_trained,
    )  # fmt: skip
    _show(report, as_json)


def finetune(
    run: RunPath,
    store: StoreName,
    labels: LabelFolder,
    out: Annotated[Path, typer.Option(help="Folder for finetune.json and the weights.")],
    classes: Classes = None,
    steps: Annotated[int, typer.Option(help="Steps of each of the two starts.", min=1)] = 300,
    batch: Annotated[int, typer.Option(help="Crops per step.", min=1)] = 2,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    seeds: Annotated[int, typer.Option(help="Repetitions, each of both starts.", min=1)] = 2,
    half_resolution: Annotated[
        bool, typer.Option("--half-resolution", help="Decode cells of two voxels: faster, edges are blunter.")
    ] = False,
    test: Annotated[float, typer.Option(help="Share of the unseen labelled patients that is scored.")] = 0.25,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    include_trained: IncludeTrained = False,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Learn segmentation from the pre-trained encoder and from scratch, with the same budget; Dice by class.

    Labels are files named after volume ids, see `maesil link-labels`.

    Example: maesil finetune run store.zarr --labels labels --out segmentation
    """
    from maesil.downstream.finetune import FinetuneBudget
    from maesil.downstream.finetune import finetune as run_finetune

    budget = FinetuneBudget(steps, batch, lr, seeds=seeds, half_resolution=half_resolution)
    report = run_finetune(
        run, found(store), labels, out, budget=budget, classes=classes or (), test=test, seed=seed, device=device,
        include_trained=include_trained,
    )  # fmt: skip
    _show(report, as_json)


def prove(
    run: RunPath,
    store: StoreName,
    labels: LabelFolder,
    out: Annotated[Path, typer.Option(help="Folder for prove.json, the page and the finished parts.")],
    budget: Annotated[
        str,
        typer.Option(
            metavar="frozen|tiny|cpu-2h|gpu", help="How much is learnt, and how often (maesil/downstream/prove.toml)."
        ),
    ] = "tiny",
    patients: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Learn segmentations from N patients, 0: all; may be repeated (default: the budget's).",
        ),
    ] = None,
    part: Annotated[
        str,
        typer.Option(
            metavar="validation|test",
            help="Who is scored; choose on validation patients, score test patients once.",
            autocompletion=words_of("maesil.downstream.cohort", "PARTS"),
        ),
    ] = "validation",
    split: Annotated[
        Path | None, typer.Option(help="Frozen split, see `maesil store split` (default: drawn by --seed).")
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="Another run to compare with, such as an AE; may be repeated.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Another encoder: from int16 HU [z, y, x] to tokens [n, d]; may be repeated.",
        ),
    ] = None,
    classes: Classes = None,
    seed: Annotated[int, typer.Option(help="Seed of draws and untrained weights; the first one of segmentations.")] = 0,
    include_trained: IncludeTrained = False,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Ask whether an encoder helps: frozen and fine-tuned, beside controls, on labelled scans; one page says it.

    Finished parts are kept: the same command goes on where it stopped.

    Example: maesil prove run store.zarr --labels labels --out proof --split split.json
    """
    from maesil.downstream.prove import ProofBudget
    from maesil.downstream.prove import prove as run_prove

    chosen = ProofBudget.load(budget).learnt_from(patients or ())
    proof = run_prove(
        run, found(store), labels, out, budget=chosen, part=part, split_file=split, also=also or (),
        adapters=adapter or (), classes=classes or (), seed=seed, device=device, include_trained=include_trained,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(proof.document(), indent=1))
    else:
        print_all(*proof.shown(), proof.summary(), f"page: {out / 'index.html'}")


def _show(report: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.document(), indent=1))
    else:
        print_all(*report.table())


def link_labels(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="The report folder of `maesil ingest`.")],
    image: Annotated[str, typer.Option(help="Regular expression found in the path of an ingested file.")],
    label: Annotated[str, typer.Option(help="What it becomes in the path of its label; \\1 for groups.")],
    out: Annotated[Path, typer.Option(help="Folder for the links, for --labels.")],
) -> None:
    r"""Link label files under the ids that their scans have in the store.

    Example: maesil link-labels btcv.report --image 'img/img(\d+)' --label 'label/label\1' --out labels
    """
    from maesil.downstream.link_labels import link_labels as make_links

    linked = make_links(report, out, image, label)
    for path, volumes in linked.shared:
        typer.echo(f"{path}: label of {volumes} volumes; right only if they are of one scan, else look at --image")
    without = f": {', '.join(linked.without[:3])}{', ...' * (len(linked.without) > 3)}" if linked.without else ""
    left = counted(len(linked.without), "volume")
    typer.echo(f"{out}: labels of {counted(linked.volumes, 'volume')}, {left} without{without}")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (export, nnunet_plan, features, probe, finetune, prove, link_labels):
        app.command(command.__name__.replace("_", "-"))(command)
