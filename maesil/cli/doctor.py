"""``maesil doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from maesil.cli.options import AsJson
from maesil.cli.output import print_all


def doctor(
    store: Annotated[str | None, typer.Argument(metavar="[STORE]", help="A store: does it fit here?")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, what will run where, whether a store fits, and what to change.

    Example: maesil doctor store.zarr
    """
    from maesil.doctor import examine, report
    from maesil.store.urls import place_of

    findings = examine(place_of(store) if store else None)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print_all(*report(findings))


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(doctor)
