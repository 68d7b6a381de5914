"""The endpoint of an S3-compatible server, as the environment names it.

It may hold a secret, so no message repeats it.
"""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from maesil.errors import UsageError

_NAMES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_HERE = ("localhost", "127.0.0.1", "::1")


def require_endpoint() -> None:
    """Raise UsageError where the environment names an endpoint that is no URL; obstore would end the process."""
    for name in _NAMES:
        if (value := os.environ.get(name)) and not _is_url(value):
            raise UsageError(f"{name}: expected https://HOST or http://HOST:PORT, found something else; set it anew")


def endpoint_is_here() -> bool:
    """Return whether the endpoint that the environment names is on this machine, where nobody listens in."""
    named = next((os.environ[name] for name in _NAMES if os.environ.get(name)), "")
    return urlsplit(named).hostname in _HERE


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
    return right and not re.search(r"\s", value)
