"""``maesil cache``: the stores that `maesil ingest` made without ``--out``.

Heavy packages are imported inside the commands only.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from maesil.cli.options import AsJson
from maesil.cli.output import print_all
from maesil.errors import EXIT_REFUSED, UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

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
    documents = [_document(catalogue, entry) for entry in catalogue.entries()]
    if as_json:
        typer.echo(json.dumps(documents, indent=1))
    elif documents:
        total = sum(document["bytes"] for document in documents)
        print_all(_table(documents), f"{len(documents)} stores, {_size(total)} in {catalogue.root}")
    else:
        typer.echo(f"no stores in {catalogue.root}; `maesil ingest SRC...` without --out makes one")
    _tell_unreadable(catalogue)


@app.command("path")
def path(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A store (default: the cache itself).")] = None,
) -> None:
    """Print where the cache, or one of its stores, lies.

    Example: maesil cache path LIDC-1.5mm
    """
    from maesil.cache.catalogue import Catalogue

    catalogue = Catalogue()
    typer.echo(str(catalogue.named(name).store if name else catalogue.root))


@app.command("prune")
def prune(
    max_size: Annotated[str, typer.Option(help="What may stay, for example 200GB or 0.")],
    force: Force = False,
) -> None:
    """Remove the stores not used for the longest time until the rest fits; those that runs use stay.

    Exit code 1 means that more than that stayed.

    Example: maesil cache prune --max-size 200GB
    """
    from maesil.cache.catalogue import Catalogue

    limit, catalogue = parse_size(max_size), Catalogue()
    for entry, size, why in catalogue.prune(limit, force=force):
        typer.echo(f"kept {entry.name} ({_size(size)}): {why}" if why else f"removed {entry.name} ({_size(size)})")
    left = sum(entry.bytes for entry in catalogue.entries())
    typer.echo(f"{_size(left)} left in {catalogue.root}")
    _tell_unreadable(catalogue)
    if left > limit:
        raise typer.Exit(EXIT_REFUSED)


@app.command("rm")
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Stores of the cache.")],
    force: Force = False,
) -> None:
    """Remove stores from the cache; their sources are untouched.

    Example: maesil cache rm LIDC-1.5mm
    """
    from maesil.cache.catalogue import Catalogue

    catalogue = Catalogue()
    for entry in [catalogue.named(name) for name in dict.fromkeys(names)]:
        typer.echo(f"removed {entry.name}, {_size(catalogue.remove(entry, force=force))} freed")


def _tell_unreadable(catalogue: Any) -> None:
    for folder in catalogue.unreadable():
        typer.echo(f"{folder}: its entry.json cannot be read; ingest its sources again, or remove the folder", err=True)


def parse_size(text: str) -> int:
    """Return the bytes that ``200GB``, ``1.5TiB`` or ``0`` names; UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"--max-size: expected a size such as 200GB, 1.5TB or 0, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def _document(catalogue: Any, entry: Any) -> dict[str, Any]:
    built = entry.built
    return {
        "name": entry.name,
        "key": entry.key,
        "path": str(entry.store),
        "report": str(entry.report),
        "sources": list(entry.sources),
        "recipe": entry.recipe,
        "state": "building" if catalogue.builder(entry) else "finished" if built else "unfinished",
        "fingerprint": built.fingerprint if built else None,
        "volumes": built.volumes if built else None,
        "patients": built.patients if built else None,
        "superpatches": built.superpatches if built else None,
        "refused": built.refused if built else None,
        "bytes": entry.bytes,
        "created": entry.created,
        "used": datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds"),
        "pins": entry.pins(),
    }


def _table(documents: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="Stores", title_justify="left")
    for column in ("name", "state", "volumes", "patients", "tiles", "size", "used", "pinned by", "sources"):
        right = column in ("volumes", "patients", "tiles", "size")
        table.add_column(column, justify="right" if right else "left", no_wrap=column == "name", overflow="fold")
    for document in documents:
        counts = [str(document[name] if document[name] is not None else "") for name in _COUNTS]
        pins = "\n".join(str(pin["run"]) for pin in document["pins"])
        table.add_row(document["name"], document["state"], *counts, _size(document["bytes"]),
                      document["used"][:10], pins, "\n".join(document["sources"]))  # fmt: skip
    return table


_COUNTS = ("volumes", "patients", "superpatches")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"
