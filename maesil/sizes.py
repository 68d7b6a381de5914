"""Sizes in bytes as people write them: ``500MB``, ``1.5 TiB``. One reader and one writer for all options."""

from __future__ import annotations

import re

from maesil.errors import UsageError

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>[a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str, option: str, instead: str = "") -> int:
    """Return the bytes that ``500MB``, ``8g``, ``1.5TiB`` or ``0`` name; UsageError, naming the option, for others.

    MB are 10^6 bytes, MiB are 2^20. A number without a unit is refused: ``200`` could mean bytes or gigabytes.
    ``instead`` says what else the option takes, such as ``auto or ``.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{option}: expected {instead}a size such as 500MB or 1.5TB, found {text!r}")
    number, unit = float(match["number"]), match["unit"].lower()
    if not unit and number:
        raise UsageError(
            f"{option}: expected {instead}a size with its unit, found {text!r}; did you mean {match['number']}GB?"
        )
    scale = (_DECIMAL | _BINARY).get(unit.removesuffix("b"))
    if scale is None:
        raise UsageError(f"{option}: expected a unit such as MB, GB or GiB, found {match['unit']!r} in {text!r}")
    return int(number * scale)


def size_text(count: int) -> str:
    """Return bytes as people read them, in units of 1000: ``1.5 GB``."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
