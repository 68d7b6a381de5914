"""Code that stands in the documentation, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def snippets(page: str) -> dict[str, str]:
    """The first Python block of each section of a page, by the section's title."""
    parts = re.split(r"^## (.*)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {}
    for title, text in zip(parts[1::2], parts[2::2], strict=True):
        if block := re.search(r"```python\n(.*?)```", text, re.DOTALL):
            found[title] = block[1]
    return found
