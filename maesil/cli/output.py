"""How commands print: names of files and texts of headers cannot steer the terminal."""

from __future__ import annotations

import sys
from typing import Any

from maesil.text import printable


def print_all(*renderables: Any) -> None:
    """Print tables and lines of text; piped output is not wrapped at 80 columns: lines stay whole for grep."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=160)
    for given in renderables:
        renderable = "\n".join(map(printable, given.split("\n"))) if isinstance(given, str) else given
        console.print(renderable, highlight=False, markup=False, soft_wrap=isinstance(renderable, str))
