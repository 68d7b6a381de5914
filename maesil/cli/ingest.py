"""``maesil ingest``.

Heavy packages are imported inside the commands only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from maesil.cli.options import AsJson
from maesil.cli.output import print_all
from maesil.errors import EXIT_REFUSED, SecurityError, UsageError

_RECIPE, _RUN, _REPORT = "What becomes of the voxels", "How it runs", "Reports and identities"

_STAGES = {"scan": "files", "hash": "sources", "build": "volumes"}

Sources = Annotated[list[str], typer.Argument(metavar="SRC...", help="Files or folders; searched all the way down.")]


def _option(help_text: str, *names: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **more)


def ingest(
    sources: Sources,
    out: Annotated[
        str | None, typer.Option(help="The store to make or to add to (default: found or made in the cache).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the store in the cache (default: after SRC).")] = None,
    spacing: Annotated[str, _option("native, MM, or Z,Y,X in mm.", panel=_RECIPE)] = "1.5",
    superpatch: Annotated[int, _option("Edge of a superpatch in voxels.", panel=_RECIPE)] = 128,
    codec: Annotated[str, _option("fast, compact or raw.", panel=_RECIPE)] = "fast",
    fill_gaps: Annotated[
        int, _option("Interpolate up to so many missing slices in a row (marked not valid).", panel=_RECIPE)
    ] = 0,
    include_derived: Annotated[
        bool, _option("Take reformats (MPR, MIP...) too.", "--include-derived", panel=_RECIPE)
    ] = False,
    prefer: Annotated[str, _option("sform or qform, where a NIfTI file's two differ.", panel=_RECIPE)] = "",
    accept: Annotated[
        list[str] | None, _option("Code of a doubt about HU to accept on purpose; may be repeated.", panel=_RECIPE)
    ] = None,
    refuse: Annotated[
        list[str] | None, _option("Note to refuse, for example lossy; may be repeated.", panel=_RECIPE)
    ] = None,
    workers: Annotated[
        int | None, _option("Dask processes (default: a core each as memory allows; 0: none).", panel=_RUN, min=0)
    ] = None,
    scheduler: Annotated[str | None, _option("Address of a running Dask scheduler.", panel=_RUN)] = None,
    trust_network: Annotated[
        bool, _option("Allow a plain TCP scheduler on another machine.", "--trust-network", panel=_RUN)
    ] = False,
    partition: Annotated[str | None, _option("I/N: only the I-th of N parts (job arrays).", panel=_RUN)] = None,
    dry_run: Annotated[bool, _option("Say what would be done; write nothing.", "--dry-run", panel=_RUN)] = False,
    update: Annotated[
        bool, _option("Allow another recipe: its volumes are made anew.", "--update", panel=_RUN)
    ] = False,
    rehash: Annotated[
        bool, _option("Read sources again even if size and time are unchanged.", "--rehash", panel=_RUN)
    ] = False,
    force: Annotated[bool, _option("Make every volume anew.", "--force", panel=_RUN)] = False,
    retry_quarantined: Annotated[
        list[str] | None, _option("Code of earlier refusals to try again, or all; may be repeated.", panel=_RUN)
    ] = None,
    duplicates: Annotated[
        str, _option("keep-all or keep-first, of sources with the very same pixels.", panel=_RUN)
    ] = "keep-all",
    group: Annotated[
        str, _option("Regular expression: the patient in the path of files that name none (NIfTI).", panel=_REPORT)
    ] = "",
    follow_links: Annotated[bool, _option("Follow symbolic links below SRC.", "--follow-links", panel=_RUN)] = False,
    max_refused: Annotated[
        int, _option("Refused volumes and damaged files that still count as success.", panel=_RUN, min=0)
    ] = 0,
    report: Annotated[
        Path | None, _option("Folder for index.html, files.parquet... (default: beside the store).", panel=_REPORT)
    ] = None,
    key_file: Annotated[
        Path | None, _option("Key for hashing identities (default: the user's own).", panel=_REPORT)
    ] = None,
    id_map: Annotated[
        Path | None, _option("Write which patient and series became which volume to this file.", panel=_REPORT)
    ] = None,
    phi_scan: Annotated[
        bool, _option("Search the finished store for the sources' patients; exit code 6.", "--phi-scan", panel=_REPORT)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn all CT below SRC into a store of superpatches.

    What is there already is left alone: the same command again goes on, or does nothing. Without --out the store is
    found or made in the cache, by sources and recipe; see `maesil cache`. Exit code 1 means that volumes were refused;
    the table says which and why.

    Example: maesil ingest downloads/LIDC downloads/btcv.nii.gz --out store.zarr --spacing 1.5
    """
    from maesil.cache.key import cache_folder
    from maesil.files import require_folder_place
    from maesil.ingest.options import IngestOptions, parse_partition
    from maesil.store.recipe import Recipe, parse_spacing
    from maesil.store.storage import local_path

    recipe = Recipe(
        spacing=parse_spacing(spacing), superpatch=superpatch, codec=codec, fill_gaps=fill_gaps,
        include_derived=include_derived, prefer_form=prefer, accept=tuple(accept or ()), refuse=tuple(refuse or ()),
    )  # fmt: skip
    options = IngestOptions(
        workers=workers, scheduler=scheduler, trust_network=trust_network,
        partition=parse_partition(partition) if partition else None, dry_run=dry_run, update=update, rehash=rehash,
        force=force, retry_quarantined=tuple(retry_quarantined or ()), duplicates=duplicates,
        follow_links=follow_links, group=group, key_file=key_file, id_map=id_map, cache_folder=cache_folder(),
    )  # fmt: skip
    if out is not None and name is not None:
        raise UsageError("--name: names a store of the cache; leave it out with --out")
    if report is not None:
        require_folder_place(report)
    places = [local_path(source) for source in sources]
    if out is None and not dry_run:
        store, folder, summary = _into_cache(places, recipe, options, name, report)
    else:
        store = local_path(out or "the cache")
        folder = _report_folder(report, store)
        summary = _into_store(places, store, recipe, options, folder)
    if as_json:
        typer.echo(json.dumps(summary.document() | {"store": str(store)}, indent=1))
    else:
        print_all(summary.table(), *summary.refusals(), summary.conclusion(store))
    if not dry_run:
        typer.echo(f"report: {folder / 'index.html'}", err=True)
    if phi_scan and not dry_run:
        _require_no_patient(store, summary)
    if summary.refused_volumes + summary.damaged_files > max_refused:
        raise typer.Exit(EXIT_REFUSED)


def _into_store(places: list[Path], store: Path, recipe: Any, options: Any, report: Path) -> Any:
    """Ingest into a store of the user's own and write the report; return the summary."""
    from maesil.ingest.report import write_report
    from maesil.ingest.run import ingest as run_ingest
    from maesil.progress import progress

    with progress(_STAGES) as shown:
        summary = run_ingest(places, store, recipe, options, shown)
    if not options.dry_run:
        write_report(report, summary, store)
    return summary


def _into_cache(
    places: list[Path], recipe: Any, options: Any, name: str | None, report: Path | None
) -> tuple[Path, Path, Any]:
    """Find or build a store in the cache; return it, its report and the summary."""
    from maesil.build import ingest_into_cache
    from maesil.ingest.report import write_report
    from maesil.progress import progress

    def say(line: str) -> None:
        typer.echo(line, err=True)

    with progress(_STAGES) as shown:
        made = ingest_into_cache(places, recipe, options, name=name, progress=shown, say=say)
    if report is not None:
        write_report(report, made.summary, made.entry.store)
    say(
        f"{'found in' if made.found else 'built in'} the cache as {made.entry.name}: maesil train {made.entry.name} ..."
    )
    return made.entry.store, report or made.entry.report, made.summary


def _report_folder(report: Path | None, out: Path) -> Path:
    folder = report or out.with_name(f"{out.name.removesuffix('.zarr')}.report")
    if folder.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"--report: expected a folder outside the store, since it holds paths; found {folder}")
    return folder


def _require_no_patient(out: Path, summary: Any) -> None:
    from maesil.ingest.phi import findings, patient_words
    from maesil.store.store import Store

    found = findings(Store.open(out), patient_words(verdict.path for verdict in summary.files))
    if found:
        raise SecurityError(
            f"{out}: expected nothing about the patients of the sources, found it in {len(found)} places "
            f"({', '.join(found[:3])}); nothing was removed: look there, and report this"
        )


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(ingest)
