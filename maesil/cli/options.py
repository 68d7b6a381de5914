"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

WHERE = "Only what a filter takes, such as 'body > 0.3 and spacing_z <= 2' (docs/how-to/cache.md lists the columns)."


def words_of(module: str, name: str, *more: str) -> Callable[[str], list[str]]:
    """Return how the shell completes an option that takes one of a closed set of words, imported only when asked."""

    def complete(incomplete: str) -> list[str]:
        known = (*getattr(import_module(module), name), *more)
        return [word for word in known if word.startswith(incomplete)]

    return complete


def names_in_cache(incomplete: str) -> list[str]:
    """Return the names of stores in the cache that the shell may complete to."""
    from maesil.cache.catalogue import Catalogue

    return [entry.name for entry in Catalogue().entries() if entry.name.startswith(incomplete)]


def found(store: str) -> Any:
    """Return where a store lies that is named by its path, its URL, or its name in the cache."""
    from maesil.cache.catalogue import find_store

    return find_store(store)


def opened(store: str) -> Any:
    """Open a store that is named by its path, or by its name in the cache."""
    from maesil.store.store import Store

    return Store.open(found(store))


StoreName = Annotated[
    str,
    typer.Argument(
        metavar="STORE", help="A store made by `maesil ingest`: its path, its URL, or its name in the cache."
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of `maesil train`.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]
