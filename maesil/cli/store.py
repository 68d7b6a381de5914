"""``maesil store``: look into a store, check it, take volumes out of it.

Heavy packages are imported inside the commands only.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maesil.cli.options import WHERE, AsJson, StoreName, opened
from maesil.cli.output import print_all
from maesil.errors import EXIT_REFUSED, EXIT_STORE, UsageError
from maesil.sizes import size_text
from maesil.text import counted

if TYPE_CHECKING:
    from maesil.data.overlap import Overlap
    from maesil.store.urls import StorePlace

_REPORT = "Report of its ingest (default: beside the store)."

app = typer.Typer(no_args_is_help=True, help="Look into a store, check it, take volumes out of it.")


@app.command("info")
def store_info(
    store: StoreName, where: Annotated[str, typer.Option(metavar="FILTER", help=WHERE)] = "", as_json: AsJson = False
) -> None:
    """Summarise a store: recipe, volumes, patients, superpatches, size.

    Example: maesil store info store.zarr
    """
    from maesil.store.summary import summary_of

    summary = summary_of(opened(store), where)
    if as_json:
        typer.echo(json.dumps(summary.document(), indent=1))
    else:
        print_all(*summary.tables())


@app.command("verify")
def store_verify(store: StoreName, as_json: AsJson = False) -> None:
    """Read and check every superpatch and map; exit code 4 if anything is damaged.

    Example: maesil store verify store.zarr
    """
    from maesil.progress import progress
    from maesil.store.verify import verify

    here = opened(store)
    with progress({"verify": "volume"}) as report:
        verified = verify(here, lambda done, total: report("verify", done, total))
    if as_json:
        typer.echo(json.dumps(asdict(verified), indent=1))
    else:
        print_all(*(f"damaged: {problem}" for problem in verified.problems))
        found = f"{counted(len(verified.problems), 'problem')} found" if verified.problems else "all intact"
        superpatches = counted(verified.superpatches, "superpatch", "superpatches")
        print_all(f"{counted(verified.volumes, 'volume')}, {superpatches}: {found}")
    if verified.problems:
        raise typer.Exit(EXIT_STORE)


@app.command("export")
def store_export(
    store: StoreName,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write into.")],
    volume_ids: Annotated[list[str] | None, typer.Argument(metavar="VOLUME_ID", help="Default: all volumes.")] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="nifti|nrrd|ome-zarr", help="What each volume becomes.")
    ] = "nifti",
    zipped: Annotated[bool, typer.Option("--zip", help="OME-Zarr in one file (VOLUME_ID.ozx).")] = False,
) -> None:
    """Write volumes for other programs (VOLUME_ID.nii.gz, int16 HU), every voxel where it was in the patient.

    NRRD is VOLUME_ID.nrrd; OME-Zarr is a folder VOLUME_ID.ome.zarr with the smaller levels and the labels.

    Example: maesil store export store.zarr --out nifti 1882660a
    """
    from maesil.store.export import EXPORTS, export_zipped
    from maesil.store.reader import SuperpatchReader

    if form not in EXPORTS:
        raise UsageError(f"--format: expected {', '.join(EXPORTS)}, found {form!r}")
    if zipped and form != "ome-zarr":
        raise UsageError(f"--zip: expected it with --format ome-zarr, found {form}")
    here = opened(store)
    wanted = [here.volume(name) for name in volume_ids] if volume_ids else here.volumes()
    reader, export = SuperpatchReader(here), export_zipped if zipped else EXPORTS[form]
    for volume in wanted:
        print_all(str(export(reader, volume.volume_id, out)))


@app.command("upgrade")
def store_upgrade(store: StoreName) -> None:
    """Bring a store to the format of today; no voxel is written again. Exit code 4 if a volume is damaged.

    It may be stopped at any time, and started again. Earlier versions of maesil no longer read the store.

    Example: maesil store upgrade store.zarr
    """
    from maesil.progress import progress
    from maesil.store.upgrade import upgrade

    here = opened(store)
    with progress({"upgrade": "volume"}) as report:
        done = upgrade(here, lambda number, total: report("upgrade", number, total))
    print_all(*(f"damaged: {problem}" for problem in done.problems))
    print_all(f"upgraded {counted(done.volumes, 'volume')}; {done.before} had nothing to add")
    if done.problems:
        raise typer.Exit(EXIT_STORE)


@app.command("add-labels")
def store_add_labels(
    store: StoreName,
    labels: Annotated[
        Path, typer.Argument(metavar="LABELS_DIR", help="Label files named after volume ids (VOLUME_ID.nii.gz...).")
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the label images.")] = "segmentation",
    classes: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME", help="This class alone. May be repeated.")
    ] = None,
) -> None:
    """Put segmentations beside the volumes of a store, on their grids, for viewers of OME-Zarr.

    Label files are placed by their affine, nearest neighbour. A file that does not cover its volume is refused.
    Label images of the same name are replaced. No voxel is written again.

    Example: maesil store add-labels store.zarr labels --name organs
    """
    from tempfile import TemporaryDirectory

    from maesil.downstream.labels import UNLABELLED, load_labels
    from maesil.store.index import write_index
    from maesil.store.labels import add_label_image

    here = opened(store)
    with TemporaryDirectory() as scratch:
        found = load_labels(labels, here.volumes(), Path(scratch), classes or ())
        done = [
            add_label_image(here, volume, name, found.of(volume), found.classes, UNLABELLED) for volume in found.volumes
        ]
    write_index(here)
    print_all(*found.notes, f"added {name!r} to {counted(sum(one is not None for one in done), 'volume')}")
    if None in done:
        print_all(f"{counted(done.count(None), 'volume')} changed meanwhile, and got none; run the same command again")


@app.command("view")
def store_view(
    store: StoreName,
    volume: Annotated[
        str | None, typer.Argument(metavar="VOLUME", help="A volume id, or its beginning (default: list all).")
    ] = None,
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes any that is free.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address only; open nothing.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help=_REPORT)] = None,
) -> None:
    """Look at volumes in a browser: three planes, windows, maps. Ctrl-C ends it, with exit code 0.

    The page is for this machine alone, and whoever has its address may read the store while the command runs.

    Example: maesil store view store.zarr 3f2a
    """
    from maesil.viewer.served_store import ServedStore
    from maesil.viewer.server import ViewServer

    here = opened(store)
    chosen = here.volume(volume).volume_id if volume else ""
    with ViewServer(ServedStore(here, _files_of(here.path, report)), port) as server:
        address = server.url(f"/volumes/{chosen}" if chosen else "/")
        typer.echo(f"{address}\nCtrl-C ends it")
        if not no_browser and _has_screen():
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    typer.echo("ended")


def _has_screen() -> bool:
    """Return whether somebody sits at a terminal of this machine, with a screen to open a browser on."""
    shown = sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return shown and sys.stdout.isatty()


@app.command("index")
def store_index(store: StoreName) -> None:
    """Make the Parquet tables of a store anew from its commits.

    Example: maesil store index store.zarr
    """
    from maesil.store.index import write_index

    volumes, superpatches = write_index(opened(store))
    print_all(f"indexed {counted(volumes, 'volume')}, {counted(superpatches, 'superpatch', 'superpatches')}")


@app.command("gc")
def store_gc(
    store: StoreName,
    older_than: Annotated[
        float, typer.Option(metavar="HOURS", min=0, help="Hours that nothing has touched it.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
) -> None:
    """Remove what no volume needs: attempts replaced or never committed, and files left by killed processes.

    Example: maesil store gc store.zarr --dry-run
    """
    from maesil.store.garbage import find_garbage, remove_garbage

    here = opened(store)
    found = find_garbage(here, older_than)
    for garbage in found:
        print_all(f"{garbage.key} ({size_text(garbage.bytes)}): {garbage.why}")
        if not dry_run:
            remove_garbage(here, garbage)
    freed = size_text(sum(garbage.bytes for garbage in found))
    print_all(f"{counted(len(found), 'piece')}, {freed} {'to be freed' if dry_run else 'freed'}")


@app.command("split")
def store_split(
    stores: Annotated[list[str], typer.Argument(metavar="STORE", help="Stores: paths or names in the cache.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")],
    shares: Annotated[
        str, typer.Option(metavar="A,B,C", help="Of training, validation and test patients.")
    ] = "0.8,0.1,0.1",
    seed: Annotated[int, typer.Option(metavar="N", help="Who falls where.")] = 0,
) -> None:
    """Split the patients of stores by hash and freeze the split to a file; copies of one scan stay together.

    Example: maesil store split store.zarr --out split.json --shares 0.8,0.1,0.1
    """
    from maesil.data.split import PARTS, parse_shares, split_by_shares, write_split
    from maesil.store.index import patients

    those = [opened(store) for store in stores]
    leaders = patients(those)
    split = split_by_shares(leaders, parse_shares(shares), seed)
    write_split(out, split, [store.fingerprint for store in those])
    counts = (f"{len({leaders[group] for group in getattr(split, part)})} {part}" for part in PARTS)
    print_all(f"{out}: patients: {', '.join(counts)}; use it with maesil train --split {out}")


@app.command("overlap")
def store_overlap(
    store: StoreName,
    others: Annotated[
        list[str] | None, typer.Argument(metavar="[OTHER]...", help="Stores that may hold the same scans.")
    ] = None,
    runs: Annotated[
        list[Path] | None, typer.Option("--run", metavar="RUN", help="A run that may have seen them. May be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which scans of STORE other stores hold or runs have seen, also resampled, renamed, cut or mirrored.

    Exit code 1 if there are any.

    Example: maesil store overlap test.zarr train.zarr --run run
    """
    from maesil.data.overlap import overlaps

    if not (others or runs):
        raise UsageError("expected another store, or a run with --run RUN, to compare with; found none")
    found, notes = overlaps(opened(store), [opened(other) for other in others or ()], runs or ())
    if as_json:
        typer.echo(json.dumps({"overlaps": [asdict(one) for one in found], "notes": notes}, indent=1))
    else:
        print_all(*(_overlap_told(one) for one in found), *notes)
        print_all(f"{counted(len({one.volume_id for one in found}), 'scan')} of {store} known")
    if found:
        raise typer.Exit(EXIT_REFUSED)


def _overlap_told(one: Overlap) -> str:
    used = f" ({one.part})" if one.part else ""
    return f"volume {one.volume_id} is {one.known_volume_id} of {one.where}{used}, by {one.by}"


@app.command("explain")
def explain(
    store: StoreName,
    volume: Annotated[str, typer.Argument(metavar="VOLUME", help="A volume id, or its beginning.")],
    report: Annotated[Path | None, typer.Option(metavar="DIR", help=_REPORT)] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a volume is made of, from which files, or why its source was refused and what to do.

    Example: maesil store explain store.zarr 3f2a
    """
    from maesil.store.explain import explanation

    here = opened(store)
    told = explanation(here, volume, _files_of(here.path, report))
    if as_json:
        typer.echo(json.dumps(told.document(), indent=1))
    else:
        print_all(*told.lines())


def _files_of(store: StorePlace, report: Path | None) -> dict[str, list[str]]:
    """Return the files of each volume by its id, from the report of the store's ingest, where there is one."""
    from maesil.ingest.report_folder import files_of
    from maesil.text import printable

    files = files_of(report or _report_beside(store), store)
    return {name: [printable(path) for path in paths] for name, paths in files.items()}


def _report_beside(store: StorePlace) -> Path:
    from maesil.cache.catalogue import entry_of
    from maesil.ingest.report_folder import default_folder

    entry = entry_of(store)
    return entry.report if entry else default_folder(store)
