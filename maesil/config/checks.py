"""What is asked of a value that somebody typed: one that does not hold ends in a `UsageError` that names it."""

from __future__ import annotations

import difflib

from maesil.errors import UsageError

_LISTED_IN_ONE_LINE = 8


def require(condition: bool, name: str, found: object, expected: str) -> None:
    """Raise UsageError with the name of an option, the value found and what would do, unless a condition holds."""
    if not condition:
        raise UsageError(f"{name}={found}: expected {expected}")


def is_text(text: str) -> bool:
    """Return whether UTF-8 can hold it: bytes of a command line that are none reach Python as half characters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def require_known(name: str, known: list[str], what: str, listed_in: str = "docs/reference/configuration.md") -> None:
    """Raise UsageError unless ``name`` is one of ``known``: say which ones may have been meant, list them if few."""
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    told = (
        f"there are {', '.join(known)}" if len(known) <= _LISTED_IN_ONE_LINE else f"{listed_in} lists all {len(known)}"
    )
    raise UsageError(f"{name}: no such {what}; {hint}{told}")
