"""Files that appear under their name whole or not at all: written beside it first, then named. The one place for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maesil.errors import NO_HARD_LINKS, UsageError


@contextmanager
def named_when_whole(
    path: Path, partial: Path, *, new: bool = False, durable: bool = False, private: bool = False
) -> Iterator[Path]:
    """Yield ``partial`` to write a file at; it becomes ``path`` once the block is done, and of a failure nothing stays.

    ``new``: FileExistsError if ``path`` is there by then, so that of several writers one wins. ``durable``: not even a
    power cut takes it back. ``private``: readable by its owner alone (mode 0600).
    """
    partial.unlink(missing_ok=True)  # of a process that was killed
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
    try:
        yield partial
        if durable:
            sync(partial)
        if new:
            make_link(partial, path)  # unlike rename, fails if the name is taken
        else:
            os.replace(partial, path)
        if durable:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def make_link(path: Path, new: Path) -> None:
    """Give a file a second name that must not exist yet: FileExistsError if it does, so that two never both have it.

    UsageError on a file system without hard links.
    """
    try:
        os.link(path, new)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        raise UsageError(
            f"{new.parent}: the file system has no hard links, so that two writers could replace each other's files; "
            "name a folder on another one"
        ) from error


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, outlast a power cut (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)
