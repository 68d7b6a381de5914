"""Code and commands that stand in the documentation, to be run as they stand there."""

from __future__ import annotations

import re
import shlex
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


def commands(page: Path) -> list[list[str]]:
    """Return the words of every indented `maesil` command of a page, without what a shell adds."""
    found = []
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))  # a command may go on in the next line
    for line in text.splitlines():
        if match := re.match(r"(?: {4,}|\t)(?:\$ )?(maesil .*)", line):
            words = shlex.split(match[1].replace("...", ""), comments=True)
            found.append([word for word in words if word not in ("[VOLUME_ID]",)])
    return found
