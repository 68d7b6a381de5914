"""``maesil demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
) -> None:
    """Run the whole path on a generated study: ingest, train, evaluate; a few minutes on a CPU.

    Example: maesil demo --out demo
    """
    from maesil.synthetic.demo import run_demo

    run_demo(out)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(demo)
