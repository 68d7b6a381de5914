"""Locks between processes that die with the process that holds them, whatever kills it. The one place for them.

The lock of a file is the system's (``flock``), and the file says who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from maesil.errors import ResourceError, UsageError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def locked(path: Path, on_wait: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
    """Hold the lock of a file, which stays; where another process holds it, say so by ``on_wait(holder)`` and wait.

    ResourceError on a file system without locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        if not _taken(file, wait=False):
            on_wait(_holder(file))
            _taken(file, wait=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def locked_now(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of a file, or raise UsageError saying ``what`` another process is at work on."""

    def refuse(holder: str) -> None:
        raise UsageError(f"{what} is being built by {holder}; wait for it, or end it")

    with locked(path, refuse):
        yield


def holder_of(path: Path) -> str | None:
    """Return which process holds a lock, None if none does; the file may be gone, and is not made."""
    try:
        file = path.open("r+")
    except (FileNotFoundError, NotADirectoryError):
        return None
    with file:
        return None if _taken(file, wait=False) else _holder(file)


def _taken(file: IO[str], *, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise ResourceError(
                f"{file.name}: the file system knows no locks; name one on another (the cache's by MAESIL_CACHE)"
            ) from error
        raise
    return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip() or "another process"
