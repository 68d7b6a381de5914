"""What help shows in place of a value of an argument or an option: a word that people read, no type of Python."""

from __future__ import annotations

from typing import Any

_BY_OPTION = {
    "--against": "RUN", "--budget": "NAME", "--classes": "CLASS", "--config": "FILE", "--device": "auto|cpu|cuda[:N]",
    "--image": "REGEX", "--json": "FILE", "--kernels": "auto|reference|triton", "--label": "REPLACEMENT",
    "--lpips-weights": "FILE", "--lr": "RATE", "--models": "MODEL", "--ram": "auto|SIZE", "--set": "SECTION.NAME=VALUE",
    "--split": "FILE", "--store": "STORE", "--test": "SHARE", "--validation": "SHARE", "--volumes": "ID|all",
    "--where": "FILTER",
}  # fmt: skip
_BY_COMMAND = {"features": {"--out": "FILE"}}
_BY_TYPE = {"Path": "DIR", "int": "N", "float": "X", "str": "TEXT"}


def readable(command: Any) -> None:
    """Give every parameter of a command, and of the commands below it, a word for its value.

    What a command itself says stays as it is.
    """
    for below in getattr(command, "commands", {}).values():
        readable(below)
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None  # its name says it
        elif parameter.metavar is None and not parameter.is_flag:
            parameter.metavar = _word_for(parameter, _BY_OPTION | _BY_COMMAND.get(command.name, {}))


def _word_for(option: Any, by_option: dict[str, str]) -> str:
    for name in option.opts:
        if name in by_option:
            return by_option[name]
    annotation = str(option.type_descriptor.annotation)
    return next((word for kind, word in _BY_TYPE.items() if kind in annotation), "VALUE")
