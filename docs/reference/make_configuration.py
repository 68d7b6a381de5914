"""Write ``configuration.md`` from the dataclasses: run it after changing an option (a test compares the two).

python docs/reference/make_configuration.py
"""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import fields, replace
from pathlib import Path

from maesil.config import schema as config
from maesil.config.presets import PRESETS
from maesil.config.schema import RunConfig

PAGE = Path(__file__).with_name("configuration.md")


def page() -> str:
    """Return the whole page."""
    columns = {name: preset for name, preset in PRESETS.items() if preset.model.kind != "primus"}
    parts = [
        "# Configuration\n\nThree tables, in TOML or as `--set SECTION.NAME=VALUE`. The columns are the presets. This "
        "page is made from the code by\n[make_configuration.py](make_configuration.py).\n\n" + _primus()
    ]
    for section in fields(RunConfig):
        kind = type(getattr(PRESETS["tiny"], section.name))
        meanings = _meanings(kind)
        lines = ["| name | " + " | ".join(columns) + " | meaning |", "| --- |" + " --- |" * (len(columns) + 1)]
        for option in fields(kind):
            values = [json.dumps(getattr(getattr(preset, section.name), option.name)) for preset in columns.values()]
            lines.append(f"| `{option.name}` | " + " | ".join(values) + f" | {meanings.get(option.name, '')} |")
        parts.append(f"## `[{section.name}]`\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _primus() -> str:
    """Return what sets the presets of Primus apart from the columns."""
    like = {replace(preset, model=replace(preset.model, kind="primus", width=72, depth=1)): name
            for name, preset in PRESETS.items() if preset.model.kind != "primus"}  # fmt: skip
    told = []
    for name, preset in PRESETS.items():
        if preset.model.kind == "primus":
            base = like[replace(preset, model=replace(preset.model, width=72, depth=1))]
            told.append(f"* `{name}`: `{base}` with `model.kind = \"primus\"`, `model.width = {preset.model.width}`, "
                        f"`model.depth = {preset.model.depth}`")  # fmt: skip
    return "Four presets more have the encoder of Primus:\n\n" + "\n".join(told)


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
