"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

WHERE = "Only what a filter takes, such as 'body > 0.3 and spacing_z <= 2' (docs/how-to/cache.md lists the columns)."


def found(store: str) -> Path:
    """Return where a store lies that is named by its path, or by its name in the cache."""
    from maesil.cache.catalogue import find_store

    return find_store(store)


def opened(store: str) -> Any:
    """Open a store that is named by its path, or by its name in the cache."""
    from maesil.store.store import Store

    return Store.open(found(store))


StoreName = Annotated[
    str, typer.Argument(metavar="STORE", help="A store made by `maesil ingest`: its path, or its name in the cache.")
]
StorePath = Annotated[
    Path, typer.Argument(metavar="STORE", parser=found, help="A store: its path, or its name in the cache.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of `maesil train`.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]
