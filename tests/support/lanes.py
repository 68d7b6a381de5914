"""Which kinds of input of a test are in the fast lane."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Return parameters of a test, all marked slow but those in ``fast``; their names stay as they are."""
    values = list(values)
    assert all(one in values for one in fast), f"expected some of {values}, found {fast}"
    return [one if one in fast else pytest.param(one, marks=pytest.mark.slow) for one in values]
