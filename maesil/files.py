"""Where results go: asked for before the work is done, and there in full or not at all once it is."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from maesil.errors import DISK_FULL, NO_HARD_LINKS, MaesilError, ResourceError, UsageError

LOCK = ".lock"
"""Name of the file by which a folder of results is locked; it stays."""
_ZARR = "zarr.json"


def make_folder(folder: Path) -> None:
    """Make a folder for results, and those above it; UsageError, in one line, where there can be none."""
    _require_no_store(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(f"{folder}: the disk is full; free space and run the same command again") from error
        found = "a file" if error.errno in (errno.EEXIST, errno.ENOTDIR) else str(error.strerror).lower()
        raise UsageError(f"{folder}: expected a folder for the results, found: {found}; name another") from error


@contextmanager
def folder_locked(folder: Path, user: str) -> Iterator[None]:
    """Make a folder for results and keep other processes from writing there; UsageError where ``user`` does already.

    The lock ends with the process, whatever ends it.
    """
    make_folder(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"{folder}: another {user} is writing there; wait for it or end it, or name another --out"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _require_no_store(folder: Path) -> None:
    """Raise UsageError for a folder in a store or another Zarr: it holds nothing but what its format says."""
    there = folder.absolute()
    for path in (there, *there.parents):
        with contextlib.suppress(OSError):  # a name too long, say: whoever makes the folder tells
            if (path / _ZARR).is_file():
                raise UsageError(
                    f"{folder}: expected a folder for the results, found one in the store {path}; name another"
                )


def require_folder_place(folder: Path) -> None:
    """Raise UsageError where a folder cannot be made since a file is in the way; make nothing yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{folder}: expected a folder for the results, found: a file ({there}); name another")


def require_writable(folder: Path, option: str, *, links: bool = False) -> None:
    """Raise unless files can be made in a folder, or in the nearest one above it that is there; nothing is left behind.

    Asked before long work, of the file system itself: a permission alone says little of read-only mounts, full disks
    and file systems without hard links (``links``). UsageError names the ``option``; ResourceError for a full disk.
    """
    probe = Path(f".maesil-{secrets.token_hex(8)}")
    second = probe.with_suffix(".link")
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe, second = there / probe, there / second
        probe.write_bytes(b"\0" * 4096)
        if links:
            make_link(probe, second)
    except OSError as error:
        raise _no_place(folder, option, error) from error
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from error
    finally:
        for path in (probe, second):
            with contextlib.suppress(OSError):
                path.unlink()


def _no_place(folder: Path, option: str, error: OSError) -> MaesilError:
    if error.errno in DISK_FULL:
        return ResourceError(f"{option}: {folder}: the disk is full; free space and run the same command again")
    found = "a file in its place" if error.errno == errno.ENOTDIR else str(error.strerror).lower()
    return UsageError(f"{option}: {folder}: expected a folder that can be written to, found: {found}; name another")


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


def require_file_place(path: Path) -> None:
    """Make the folders above a file that is to be written; UsageError where a folder has its name, or none can be."""
    if path.is_dir():
        raise UsageError(f"{path}: expected the name of a file to write, found a folder; name another")
    make_folder(path.parent)


def write_private(path: Path, data: bytes) -> None:
    """Write or replace a file all at once, readable by its owner alone (mode 0600): for what holds paths of sources."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write or replace a text file (UTF-8), with the folders above it."""
    write_bytes_whole(path, text.encode())


def write_bytes_whole(path: Path, data: bytes) -> None:
    """Write or replace a file, with the folders above it."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


@contextmanager
def results_at_once(folder: Path) -> Iterator[Path]:
    """Yield a folder to write files in, which come to lie in ``folder`` once the block is done; else none of them."""
    make_folder(folder)
    with TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        yield Path(scratch)
        for path in Path(scratch).iterdir():
            os.replace(path, folder / path.name)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a place to write a file at, which becomes ``path`` once the block is done; of a failure nothing is left."""
    require_file_place(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
