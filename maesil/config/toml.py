"""Configurations as TOML files and dotted overrides of the same names, and back."""

from __future__ import annotations

import json
import math
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from maesil.config.checks import require_known
from maesil.config.presets import PRESETS
from maesil.config.schema import RunConfig
from maesil.documents import as_json
from maesil.errors import UsageError
from maesil.types import Edges, zyx


def load_config(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    base: RunConfig = PRESETS["base"],
) -> RunConfig:
    """Resolve a configuration: a preset (else the file's ``preset``, else ``base``), the file, then overrides.

    ``file`` is TOML with tables ``model``, ``mask`` and ``train``; an override reads ``train.lr=1e-3``, its
    value written as in TOML, quotes and brackets optional. Later ones win. Raises UsageError for what is
    unknown, of another type, or impossible.
    """
    document = asked_for(file, overrides)
    in_file = document.pop("preset", None)
    if preset or in_file:
        base = _preset(preset or in_file)
    return from_document(document, base)


def asked_for(file: Path | None, overrides: Iterable[str]) -> dict[str, Any]:
    """Return what a file and overrides ask for, whatever they are laid over; UsageError for what is not readable."""
    document = _read_toml(file) if file else {}
    for override in overrides:
        name, value = _parse_override(override)
        section, _, key = name.partition(".")
        document.setdefault(section, {})
        if not key or not isinstance(document[section], dict):
            raise UsageError(f"{override!r}: expected SECTION.NAME=VALUE, for example train.lr=1e-3")
        document[section][key] = value
    return document


def from_document(document: Mapping[str, Any], base: RunConfig | None = None) -> RunConfig:
    """Lay the values of a document (see `to_document`) over ``base``; UsageError for unknown or ill-typed ones."""
    base = base or RunConfig()
    sections = {}
    for section, values in document.items():
        require_known(section, [f.name for f in fields(RunConfig)], "section")
        if not isinstance(values, Mapping):
            raise UsageError(f"{section}: expected a table of options, found {values!r}")
        current = getattr(base, section)
        types = typing.get_type_hints(type(current))
        for name in values:
            require_known(f"{section}.{name}", [f"{section}.{f.name}" for f in fields(current)], "option")
        typed = {name: _typed(f"{section}.{name}", value, types[name]) for name, value in values.items()}
        sections[section] = replace(current, **typed)
    return replace(base, **sections)


def to_document(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, lists and scalars, as JSON and TOML have them."""
    plain: dict[str, Any] = as_json(asdict(config))
    return plain


def to_toml(config: RunConfig) -> str:
    """Return the configuration as TOML: every value, in the order of the dataclasses; equal for equal values."""
    tables = [
        f"[{section}]\n" + "".join(f"{name} = {toml_value(value)}\n" for name, value in values.items())
        for section, values in to_document(config).items()
    ]
    return "\n".join(tables)


def toml_value(value: Any) -> str:
    """Return a scalar or a flat list as TOML writes it, in one line. Every text of UTF-8 is read back as it was."""
    if isinstance(value, str):
        return f'"{_NOT_AS_IT_IS.sub(_escaped, value)}"'
    return json.dumps(value)  # numbers, true and false, and lists of numbers are the same in both languages


_NOT_AS_IT_IS = re.compile(r'["\\\x00-\x1f\x7f]')
"""What a string of TOML cannot hold as it is. JSON differs: it leaves DEL alone, and halves what is beyond 16 bits."""


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _preset(name: object) -> RunConfig:
    require_known(str(name), list(PRESETS), "preset")
    return PRESETS[str(name)]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the configuration file ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected TOML, found a mistake: {error}") from error


def _parse_override(override: str) -> tuple[str, Any]:
    name, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"{override!r}: expected SECTION.NAME=VALUE, for example train.lr=1e-3")
    for candidate in (text, f"[{text}]"):
        try:
            return name.strip(), tomllib.loads(f"value = {candidate}")["value"]
        except tomllib.TOMLDecodeError:
            continue
    return name.strip(), text.strip()  # a string without quotes, such as train.device=cpu


_SIZES = ("train.ram",)
_BOX = re.compile(r"\d+x\d+x\d+")
_DESCRIBED = {float: "a number", int: "a whole number", str: "a word", bool: "true or false"}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return ``value`` as the field's type; whole numbers serve as floats, lists as tuples, nothing else is bent."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and number:
        return float(value)
    if kind is int and number and isinstance(value, int):
        return value
    if kind is str and isinstance(value, str):
        return value
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise UsageError(f"{name}={value}: expected one of {', '.join(typing.get_args(kind))}")
        return value
    if kind == Edges:
        return _edges(name, value)
    if name in _SIZES and number:
        return str(value)  # refused there, with a better reason than its type: it lacks a unit
    inner = typing.get_args(kind)
    if inner and isinstance(value, list | tuple) and len(value) == len(inner):
        return tuple(_typed(name, item, item_kind) for item, item_kind in zip(value, inner, strict=True))
    described = f"{len(inner)} numbers" if inner else _DESCRIBED[kind]
    raise UsageError(f"{name}={value!r}: expected {described}")


def _edges(name: str, value: Any) -> Edges:
    """Return one edge, or three (z, y, x), given as a list or as ``32x48x64``."""
    if isinstance(value, str) and _BOX.fullmatch(value):
        value = [int(edge) for edge in value.split("x")]
    whole = [isinstance(edge, int) and not isinstance(edge, bool) for edge in _listed(value)]
    if not all(whole) or len(whole) not in (1, 3) or (len(whole) == 1) != isinstance(value, int):
        raise UsageError(f"{name}={value!r}: expected a whole number, or three for z, y, x, as 64,96,96")
    return value if isinstance(value, int) else zyx(tuple(value))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
