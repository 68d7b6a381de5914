"""``maesil ingest``.

Heavy packages are imported inside the commands only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maesil.cli.options import AsJson, words_of
from maesil.cli.output import print_all
from maesil.errors import EXIT_REFUSED, NoInputError, SecurityError, UsageError
from maesil.text import candidates, counted, printable

if TYPE_CHECKING:
    from maesil.ingest.source_path import SourcePlace
    from maesil.store.urls import StorePlace

_RECIPE, _RUN, _REPORT = "What becomes of the voxels", "How it runs", "Reports and identities"

_STAGES = {
    "list": "file", "scan": "file", "compare": "file", "plan": "series UID", "hash": "source", "build": "volume",
}  # fmt: skip
_LOOKING = ("list", "scan", "plan")

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SRC", help="Files or folders, searched all the way down; URLs of object storage; idc://COLLECTION."
    ),
]


def _option(help_text: str, metavar: str | None, *names: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar, rich_help_panel=panel, **more)


def _flag(help_text: str, name: str, panel: str) -> Any:
    return typer.Option(name, help=help_text, rich_help_panel=panel)


def _word(help_text: str, metavar: str, panel: str, known: tuple[str, str], *more: str) -> Any:
    """An option that takes one of a closed set of words, which the shell completes."""
    return _option(help_text, metavar, panel=panel, autocompletion=words_of(*known, *more))


_OPTIONS, _STORED = "maesil.ingest.options", "maesil.store.recipe"


def ingest(
    sources: Sources = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="The store to make or to add to, a path or URL (default: in the cache)."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the store in the cache (default: after SRC).")
    ] = None,
    spacing: Annotated[
        str, _option("Voxels of the store: native, one length, or three.", "native|MM|Z,Y,X", panel=_RECIPE)
    ] = "1.5",
    superpatch: Annotated[int, _option("Edge of a superpatch.", "VOXELS", panel=_RECIPE)] = 128,
    codec: Annotated[
        str, _word("How superpatches are compressed.", "fast|compact|raw", _RECIPE, (_STORED, "CODECS"))
    ] = "fast",
    fill_gaps: Annotated[
        int, _option("Interpolate up to N missing slices in a row (marked not valid).", "N", panel=_RECIPE)
    ] = 0,
    include_derived: Annotated[bool, _flag("Take reformats (MPR, MIP...) too.", "--include-derived", _RECIPE)] = False,
    prefer: Annotated[
        str, _word("Which to take where a NIfTI file's two differ.", "sform|qform", _RECIPE, (_STORED, "FORMS"))
    ] = "",
    accept: Annotated[
        list[str] | None,
        _word("A doubt about HU to accept on purpose; may be repeated.", "CODE", _RECIPE, (_STORED, "ACCEPTABLE")),
    ] = None,
    refuse: Annotated[
        list[str] | None,
        _word("A note to refuse, for example lossy; may be repeated.", "NOTE", _RECIPE, (_STORED, "REFUSABLE")),
    ] = None,
    workers: Annotated[
        int | None,
        _option("Dask processes (default: one per core, as memory allows; 0: none).", "N", panel=_RUN, min=0),
    ] = None,
    scheduler: Annotated[str | None, _option("A running Dask scheduler.", "ADDRESS", panel=_RUN)] = None,
    trust_network: Annotated[
        bool, _flag("Allow a plain TCP scheduler on another machine.", "--trust-network", _RUN)
    ] = False,
    manifest: Annotated[
        Path | None,
        _option("A table (CSV) of series, by series_url, series_aws_url or path.", "FILE", panel=_RUN),
    ] = None,
    limit_series: Annotated[
        int | None, _option("Only the first N series of manifest or collection.", "N", panel=_RUN, min=1)
    ] = None,
    partition: Annotated[str | None, _option("Only the I-th of N parts (job arrays).", "I/N", panel=_RUN)] = None,
    dry_run: Annotated[bool, _flag("Say what would be done; write nothing.", "--dry-run", _RUN)] = False,
    update: Annotated[bool, _flag("Allow another recipe: its volumes are made anew.", "--update", _RUN)] = False,
    rehash: Annotated[bool, _flag("Read sources again even if size and time are unchanged.", "--rehash", _RUN)] = False,
    force: Annotated[bool, _flag("Make every volume anew.", "--force", _RUN)] = False,
    retry_quarantined: Annotated[
        list[str] | None,
        _word(
            "Earlier refusals to try again, or all; may be repeated.",
            "CODE",
            _RUN,
            ("maesil.store.remedies", "REMEDIES"),
            "all",
        ),
    ] = None,
    duplicates: Annotated[
        str, _word("Of sources with the very same pixels.", "keep-all|keep-first", _RUN, (_OPTIONS, "DUPLICATES"))
    ] = "keep-all",
    group: Annotated[
        str, _option("Finds the patient in the path of files that name none (NIfTI).", "REGEX", panel=_REPORT)
    ] = "",
    follow_links: Annotated[bool, _flag("Follow symbolic links below SRC.", "--follow-links", _RUN)] = False,
    max_refused: Annotated[
        int,
        _option(
            "Refused volumes, damaged files and left-out rows that still count as success.", "N", panel=_RUN, min=0
        ),
    ] = 0,
    report: Annotated[
        Path | None, _option("Where index.html, files.parquet... go (default: beside the store).", "DIR", panel=_REPORT)
    ] = None,
    key_file: Annotated[
        Path | None, _option("Key for hashing identities (default: the user's own).", "FILE", panel=_REPORT)
    ] = None,
    id_map: Annotated[
        Path | None, _option("Write here which patient and series became which volume.", "FILE", panel=_REPORT)
    ] = None,
    phi_scan: Annotated[
        bool, _flag("Search the finished store for the sources' patients; exit code 6.", "--phi-scan", _REPORT)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn all CT below SRC into a store of superpatches.

    What is there already is left alone: the same command again goes on, or does nothing. Without --out the store is
    found or made in the cache, by sources and recipe; see `maesil cache`. Exit code 1 means that volumes were refused;
    the table says which and why.

    Example: maesil ingest downloads/LIDC downloads/btcv.nii.gz --out store.zarr --spacing 1.5

    Example: maesil ingest s3://bucket/dicom --out s3://bucket/store.zarr
    """
    from maesil.cache.key import cache_folder
    from maesil.ingest.named import named_sources
    from maesil.ingest.options import IngestOptions, parse_partition
    from maesil.ingest.report_folder import default_folder
    from maesil.store.recipe import Recipe, parse_spacing
    from maesil.store.urls import place_of

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
    named = named_sources(sources or (), manifest, limit_series, _say)
    places = named.places
    store: StorePlace
    try:
        if out is None and not dry_run:
            store, folder, summary = _into_cache(places, recipe, options, name, report)
        else:
            store = place_of(out or "the cache")
            folder = report or default_folder(store)
            summary = _into_store(places, store, recipe, options, folder)
    except NoInputError as nothing:
        _tell_nothing_found(nothing, None if out is None else place_of(out), report, dry_run, as_json)
        raise
    search = _search_for_patients(store, folder, summary) if phi_scan and not dry_run else None
    _tell(summary, store, as_json)
    if not dry_run:
        _say(f"report: {folder / 'index.html'}")
    if search is not None:
        _tell_search(store, search)
    if summary.refused_volumes + summary.damaged_files + named.left_out > max_refused:
        raise typer.Exit(EXIT_REFUSED)


def _tell(summary: Any, store: StorePlace, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary.document() | {"store": printable(store)}, indent=1))
    else:
        print_all(summary.table(), *summary.refusals(), *summary.noted(), summary.conclusion(store))


def _tell_nothing_found(
    nothing: NoInputError, store: StorePlace | None, report: Path | None, dry_run: bool, as_json: bool
) -> None:
    """Print what any run prints, and write its report: why each file that was found is no CT."""
    from maesil.ingest.report import write_report
    from maesil.ingest.report_folder import default_folder
    from maesil.ingest.summary import NothingFound

    if not isinstance(nothing, NothingFound):  # there is no such source
        return
    folder = report or (None if store is None else default_folder(store))
    store = store or Path("the cache")
    _tell(nothing.summary, store, as_json)
    if nothing.summary.files and folder is not None and not dry_run:
        write_report(folder, nothing.summary, store)
        _say(f"report: {folder / 'index.html'}")


def _into_store(places: list[SourcePlace], store: StorePlace, recipe: Any, options: Any, report: Path) -> Any:
    """Ingest into a store of the user's own and write the report; return the summary."""
    from maesil.ingest.report import write_report
    from maesil.ingest.report_folder import require_place
    from maesil.ingest.run import ingest as run_ingest
    from maesil.progress import progress
    from maesil.store.backends import open_storage

    if not options.dry_run:
        open_storage(store).require_writable("--out")
        require_place(report, store)
    with progress(_STAGES, silent_when_quick=_LOOKING) as shown:
        summary = run_ingest(places, store, recipe, options, shown, _say)
    if not options.dry_run:
        write_report(report, summary, store)
    return summary


def _say(line: str) -> None:
    typer.echo(printable(line), err=True)


def _into_cache(
    places: list[SourcePlace], recipe: Any, options: Any, name: str | None, report: Path | None
) -> tuple[Path, Path, Any]:
    """Find or build a store in the cache; return it, its report and the summary."""
    from maesil.build import ingest_into_cache
    from maesil.files import require_folder_place, require_writable
    from maesil.ingest.report import write_report
    from maesil.progress import progress

    if report is not None:
        require_folder_place(report)
        require_writable(report, "--report")
    with progress(_STAGES, silent_when_quick=_LOOKING) as shown:
        made = ingest_into_cache(places, recipe, options, name=name, progress=shown, say=_say)
    if report is not None:
        write_report(report, made.summary, made.entry.store)
    _say(
        f"{'found in' if made.found else 'built in'} the cache as {made.entry.name}: maesil train {made.entry.name} ..."
    )
    return made.entry.store, report or made.entry.report, made.summary


def _search_for_patients(store: StorePlace, report: Path, summary: Any) -> Any:
    """Search the finished store for what its sources say of patients, and note in the report what was searched."""
    from maesil.ingest.phi import search
    from maesil.ingest.report import note_phi_scan
    from maesil.store.store import Store

    found = search(Store.open(store), [verdict.path for verdict in summary.files])
    summary.phi_scan = found
    note_phi_scan(report, found)
    return found


def _tell_search(store: StorePlace, search: Any) -> None:
    _say(search.told())
    if search.found:
        raise SecurityError(
            f"{store}: expected nothing about the patients of the sources, found it in "
            f"{counted(len(search.found), 'place')} ({candidates(search.found, 3)}); nothing was removed: look there, "
            "and report this"
        )


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(ingest)
