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
    except json.JSONDecodeError as error:
        where = f"from line {error.lineno} on" if error.doc.strip() else "but an empty file"
        raise ValueError(f"it is no JSON {where}") from error
    except UnicodeDecodeError as error:
        raise ValueError("it is no text in UTF-8") from error


def reason(error: Exception) -> str:
    """Return in words why a document is not what was expected: Python's own texts speak of its types."""
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    if isinstance(error, TypeError | AttributeError):
        return "a field holds another kind of value"
    return str(error)


def canonical_json(document: Any) -> bytes:
    """Return JSON with sorted keys, no spaces and no NaN: equal values give equal bytes (after RFC 8785)."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
