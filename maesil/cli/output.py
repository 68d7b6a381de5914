"""How commands print."""

from __future__ import annotations

import sys
from typing import Any


def print_all(*renderables: Any) -> None:
    """Print tables and lines of text; piped output is not wrapped at 80 columns: lines stay whole for grep."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=160)
    for renderable in renderables:
        console.print(renderable, highlight=False, markup=False, soft_wrap=isinstance(renderable, str))
