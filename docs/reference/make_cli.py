"""Write ``cli.md`` from the commands: run it after changing a command or an option (a test compares the two).

python docs/reference/make_cli.py
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from maesil.cli import app

PAGE = Path(__file__).with_name("cli.md")
_WORDS = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}
_HEAD = """# Command line

One section per command. `maesil COMMAND --help` prints the same.

Results go to standard output. Progress and messages go to standard error. Every command ends with one of the
[exit codes](verdicts.md#exit-codes).

* A `STORE` is the path of a store, a `file://` URL, or its name in the [cache](../how-to/cache.md).
* A volume id may be shortened to any beginning that is unique in its store.
* A size is a number with its unit: `500MB`, `1.5TB` (powers of 1000), `8GiB` (powers of 1024). Only 0 needs no unit.
* `-h` is short for `--help`.
* `maesil --install-completion` lets the shell complete commands, options and names of stores in the cache.

This page is made from the commands by [make_cli.py](make_cli.py).
"""


def page() -> str:
    """Return the whole page."""
    commands = list(_leaves(typer.main.get_command(app), "maesil"))
    contents = ["| command | does |", "| --- | --- |"]
    for name, command in commands:
        contents.append(f"| [`{name}`](#{name.replace(' ', '-')}) | {_escaped(_first_sentence(command))} |")
    return "\n\n".join([_HEAD.rstrip(), "\n".join(contents), *(_section(*one) for one in commands)]) + "\n"


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every command below a group, with the words that call it."""
    for word, sub in getattr(command, "commands", {}).items():
        yield from _leaves(sub, f"{name} {word}")
    if not hasattr(command, "commands"):
        yield name, command


def _section(name: str, command: Any) -> str:
    told, _, example = command.help.partition("Example: ")
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    usage = " ".join([name, *(_metavar(one) for one in arguments)]) + " [OPTIONS]" * bool(options)
    parts = [f"## {name}", " ".join(told.split()), f"    {usage}"]
    if example:
        parts.append(f"Example:\n\n    {' '.join(example.split())}")
    if arguments:
        rows = [f"| `{_metavar(one)}` | {_escaped(one.help)} |" for one in arguments]
        parts.append("\n".join(["| argument | meaning |", "| --- | --- |", *rows]))
    panels: dict[str, list[Any]] = {}
    for one in options:
        panels.setdefault(getattr(one, "rich_help_panel", None) or "", []).append(one)
    for panel, members in panels.items():
        rows = [f"| {_names(one, command)} | {_default(one)} | {_escaped(one.help)} |" for one in members]
        table = "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])
        parts.append(f"*{panel}*\n\n{table}" if panel else table)
    return "\n\n".join(parts)


def _metavar(argument: Any) -> str:
    shown: str = argument.metavar or argument.name.upper()
    if not argument.required and not shown.startswith("["):
        shown = f"[{shown}]"
    return shown + "..." * (argument.nargs == -1 and not shown.endswith("..."))


def _names(option: Any, command: Any) -> str:
    """Return all names of an option, and the kind of value that it takes."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    hint = typing.get_type_hints(command.callback)[option.name]
    outer = typing.get_args(hint)  # of `list[str] | None`: list[str], None
    kinds = {hint, *outer} | {inner for kind in outer for inner in typing.get_args(kind)}
    word = option.metavar or next((word for kind, word in _WORDS.items() if kind in kinds), "")
    return f"{names} {_escaped(word)}".rstrip()


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.default in (None, "", [], ()) or option.default is False:
        return ""
    return f"`{option.default}`"


def _first_sentence(command: Any) -> str:
    return " ".join(command.help.split("\n\n")[0].split()).removesuffix(".")


def _escaped(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: {page().count(chr(10) + '## ')} commands")
