"""Planting a bug: one text of a file stands in place of another."""

from __future__ import annotations


def planted(text: str, old: str, new: str, file: str) -> str:
    """Return the text of a file with a bug in it; ValueError where the place is not one."""
    if (found := text.count(old)) != 1:
        raise ValueError(f"{file}: expected once, found {found} times: {old!r}; plant the bug anew")
    return text.replace(old, new)
