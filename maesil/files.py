"""Where results go: asked for before the work is done, and there in full or not at all once it is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from maesil.errors import DISK_FULL, ResourceError, UsageError


def make_folder(folder: Path) -> None:
    """Make a folder for results, and those above it; UsageError, in one line, where there can be none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(f"{folder}: the disk is full; free space and run the same command again") from error
        found = "a file" if error.errno in (errno.EEXIST, errno.ENOTDIR) else str(error.strerror).lower()
        raise UsageError(f"{folder}: expected a folder for the results, found: {found}; name another") from error


def require_folder_place(folder: Path) -> None:
    """Raise UsageError where a folder cannot be made since a file is in the way; make nothing yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{folder}: expected a folder for the results, found: a file ({there}); name another")


def require_file_place(path: Path) -> None:
    """Make the folders above a file that is to be written; UsageError where a folder has its name, or none can be."""
    if path.is_dir():
        raise UsageError(f"{path}: expected the name of a file to write, found a folder; name another")
    make_folder(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write or replace a text file (UTF-8), with the folders above it."""
    require_file_place(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
