"""Write ``configuration.md`` from the dataclasses: run it after changing an option (a test compares the two).

python docs/reference/make_configuration.py
"""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import fields
from pathlib import Path

from maesil.config import schema as config
from maesil.config.schema import PRESETS, RunConfig

PAGE = Path(__file__).with_name("configuration.md")


def page() -> str:
    """Return the whole page."""
    parts = [
        "# Configuration\n\nThree tables, in TOML or as `--set SECTION.NAME=VALUE`. The columns are the presets. This "
        "page is made from the code by\n[make_configuration.py](make_configuration.py)."
    ]
    for section in fields(RunConfig):
        kind = type(getattr(PRESETS["tiny"], section.name))
        meanings = _meanings(kind)
        lines = ["| name | " + " | ".join(PRESETS) + " | meaning |", "| --- |" + " --- |" * (len(PRESETS) + 1)]
        for option in fields(kind):
            values = [json.dumps(getattr(getattr(preset, section.name), option.name)) for preset in PRESETS.values()]
            lines.append(f"| `{option.name}` | " + " | ".join(values) + f" | {meanings.get(option.name, '')} |")
        parts.append(f"## `[{section.name}]`\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _meanings(kind: type) -> dict[str, str]:
    """Return the docstring that stands below each field."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            found[field.target.id] = " ".join(str(after.value.value).replace("``", "`").split()).replace("|", "\\|")
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: {len(PRESETS)} presets of {config.__name__}")
