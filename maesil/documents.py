"""JSON documents: read with one error for whatever is none of ours, written so that equal values give equal bytes."""

from __future__ import annotations

import json
from typing import Any


def parsed_json(data: bytes | str) -> Any:
    """Return what JSON says; ValueError for what is none, and for what is nested too deeply to be of ours."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def canonical_json(document: Any) -> bytes:
    """Return JSON with sorted keys, no spaces and no NaN: equal values give equal bytes (after RFC 8785)."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
