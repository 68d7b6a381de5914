"""Text for people: counts with their noun, names of files that any terminal and any file can take."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode categories that steer a terminal, hide, turn the direction of reading, or stand for bytes."""


_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


def printable(text: object) -> str:
    r"""Return a text on one line without anything that steers a terminal: such characters become ``\x1b``, ``\u202e``.

    Bytes of a file name that are no UTF-8 (Python holds them as surrogates) become ``\xe4``. All else stays.
    """
    found = os.fspath(text) if isinstance(text, os.PathLike) else str(text)
    if found.isascii() and found.isprintable():
        return found
    return "".join(_escaped(letter) if unicodedata.category(letter) in _HIDDEN else letter for letter in found)


def without_credentials(text: str) -> str:
    """Return a text whose URLs hold neither a user and password in front, nor a query, which may be a signature."""
    shown = re.sub(r"(?<=://)[^/\s]*@", "...@", text)
    return re.sub(r"(://[^\s?#]*)[?#][^\s]*", r"\1?...", shown)


def written(name: object) -> str:
    r"""Return a name as tables and JSON hold it: `printable`, and so that `exact` gives the very name back.

    A backslash that would read like an escape becomes ``\x5c``.
    """
    text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    return printable(_ESCAPE.sub(r"\\x5c\1", text))


def exact(name: str) -> str:
    """Return the name that `written` was given."""
    return _ESCAPE.sub(lambda match: _letter(match[1]), name)


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8 (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _letter(escape: str) -> str:
    code = int(escape[1:], 16)
    return chr(code + 0xDC00 if escape[0] == "x" and code >= 0x80 else code)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: ``1 volume``, ``2 volumes``; ``plural`` where an s does not make it."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def candidates(found: Iterable[str], most: int = 5) -> str:
    """Return the first few names of several in one line, and how many more there are."""
    names = list(found)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
