"""``maesil cache``: the stores that `maesil ingest` made without ``--out``.

Heavy packages are imported inside the commands only.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from maesil.cli.options import AsJson, names_in_cache
from maesil.cli.output import print_all
from maesil.errors import EXIT_REFUSED
from maesil.sizes import parse_size, size_text
from maesil.text import counted, printable, written

if TYPE_CHECKING:
    from rich.table import Table

    from maesil.cache.catalogue import Catalogue, Entry

Force = Annotated[bool, typer.Option("--force", help="In spite of the runs that use it.")]

app = typer.Typer(no_args_is_help=True, help="The stores that `maesil ingest` made without --out.")


@app.command("list")
def list_stores(
    as_json: AsJson = False,
) -> None:
    """List the stores of the cache: name, what is in them, size, who uses them, sources.

    Example: maesil cache list --json
    """
    from maesil.cache.catalogue import Catalogue

    catalogue = Catalogue()
    entries = catalogue.entries()
    if as_json:
        typer.echo(json.dumps([_document(catalogue, entry) for entry in entries], indent=1))
    elif entries:
        total = sum(entry.bytes for entry in entries)
        print_all(_table(catalogue), f"{counted(len(entries), 'store')}, {size_text(total)} in {catalogue.root}")
    else:
        typer.echo(f"no stores in {catalogue.root}; `maesil ingest SRC...` without --out makes one")
    _tell_unreadable(catalogue)


@app.command("path")
def path(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A store (default: the cache itself).", autocompletion=names_in_cache),
    ] = None,
) -> None:
    """Print where the cache, or one of its stores, lies.

    Example: maesil cache path LIDC-1.5mm
    """
    from maesil.cache.catalogue import Catalogue

    catalogue = Catalogue()
    print_all(str(catalogue.named(name).store if name else catalogue.root))


@app.command("prune")
def prune(
    max_size: Annotated[str, typer.Option(metavar="SIZE", help="What may stay, with its unit: 200GB, 1.5TiB or 0.")],
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
) -> None:
    """Remove the stores not used for the longest time until the rest fits; those that runs use stay.

    It says what it will remove before it removes anything. Exit code 1 means that more than SIZE stays.

    Example: maesil cache prune --max-size 200GB --dry-run
    """
    from maesil.cache.catalogue import Catalogue

    limit, catalogue = parse_size(max_size, "--max-size"), Catalogue()
    planned = list(catalogue.prune(limit, force=force, dry_run=True))
    going = [(entry, size) for entry, size, why in planned if not why]
    typer.echo(_outlook(going, limit, "would be removed" if dry_run else "to remove"))
    for entry, size, why in planned if dry_run else catalogue.prune(limit, force=force):
        done = f"kept {entry.name} ({size_text(size)}): {why}" if why else f"removed {entry.name} ({size_text(size)})"
        if why or not dry_run:
            typer.echo(done)
    left = sum(entry.bytes for entry in catalogue.entries()) - sum(size for _, size in going if dry_run)
    typer.echo(f"{size_text(left)} {'would be left' if dry_run else 'left'} in {catalogue.root}")
    _tell_unreadable(catalogue)
    if left > limit:
        raise typer.Exit(EXIT_REFUSED)


def _outlook(going: list[tuple[Entry, int]], limit: int, verb: str) -> str:
    """Return in one line what pruning is about to remove."""
    if not going:
        return f"nothing {verb} for --max-size {size_text(limit)}"
    names = ", ".join(f"{entry.name} ({size_text(size)}, last used {_day(entry)})" for entry, size in going)
    return f"{counted(len(going), 'store')}, {size_text(sum(size for _, size in going))} {verb}: {names}"


def _day(entry: Entry) -> str:
    return datetime.fromtimestamp(entry.used, UTC).date().isoformat()


@app.command("rm")
def remove(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Stores of the cache.", autocompletion=names_in_cache)
    ],
    force: Force = False,
) -> None:
    """Remove stores from the cache; their sources are untouched.

    Example: maesil cache rm LIDC-1.5mm
    """
    from maesil.cache.catalogue import Catalogue

    catalogue = Catalogue()
    for entry in [catalogue.named(name) for name in dict.fromkeys(names)]:  # one wrong name removes nothing
        typer.echo(f"removed {entry.name}, {size_text(catalogue.remove(entry, force=force))} freed")


def _tell_unreadable(catalogue: Catalogue) -> None:
    for folder in catalogue.unreadable():
        typer.echo(f"{folder}: its entry.json cannot be read; ingest its sources again, or remove the folder", err=True)


def _state(catalogue: Catalogue, entry: Entry) -> str:
    return "building" if catalogue.builder(entry) else "finished" if entry.built else "unfinished"


def _document(catalogue: Catalogue, entry: Entry) -> dict[str, object]:
    built = entry.built
    return {
        "name": entry.name,
        "key": entry.key,
        "path": str(entry.store),
        "report": str(entry.report),
        "sources": [written(source) for source in entry.sources],
        "recipe": entry.recipe,
        "state": _state(catalogue, entry),
        "fingerprint": built.fingerprint if built else None,
        "volumes": built.volumes if built else None,
        "patients": built.patients if built else None,
        "superpatches": built.superpatches if built else None,
        "refused": built.refused if built else None,
        "bytes": entry.bytes,
        "created": entry.created,
        "used": datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds"),
        "pins": [asdict(pin) for pin in entry.pins()],
    }


def _table(catalogue: Catalogue) -> Table:
    from rich.table import Table

    table = Table(title="Stores", title_justify="left")
    for column in ("name", "state", "volumes", "patients", "superpatches", "size", "used", "pinned by", "sources"):
        right = column in ("volumes", "patients", "superpatches", "size")
        table.add_column(column, justify="right" if right else "left", no_wrap=column == "name", overflow="fold")
    for entry in catalogue.entries():
        built = entry.built
        counts = [str(n) for n in (built.volumes, built.patients, built.superpatches)] if built else [""] * 3
        pins = "\n".join(pin.run for pin in entry.pins())
        sources = "\n".join(printable(written(source)) for source in entry.sources)
        table.add_row(entry.name, _state(catalogue, entry), *counts, size_text(entry.bytes), _day(entry), pins, sources)
    return table
