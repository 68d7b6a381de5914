"""Ending early on request: after SIGTERM nothing new is begun, what runs is finished and committed."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from maesil.signals import handled

_requested = threading.Event()


def requested() -> bool:
    """Return whether the run was asked to end."""
    return _requested.is_set()


@contextlib.contextmanager
def on_sigterm() -> Iterator[None]:
    """Take SIGTERM as a request to end, as long as this lasts; in other threads than the main one nothing changes."""
    _requested.clear()
    with handled(lambda *_: _requested.set(), (signal.SIGTERM,)):
        yield
