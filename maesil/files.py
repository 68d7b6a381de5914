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

from maesil.atomic import make_link, named_when_whole
from maesil.errors import DISK_FULL, MaesilError, UsageError, disk_full
from maesil.locks import locked

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
            raise disk_full(folder) from error
        found = "a file" if error.errno in (errno.EEXIST, errno.ENOTDIR) else str(error.strerror).lower()
        raise UsageError(f"{folder}: expected a folder for the results, found: {found}; name another") from error


@contextmanager
def folder_locked(folder: Path, user: str) -> Iterator[None]:
    """Make a folder for results and keep other processes from writing there; UsageError where ``user`` does already.

    The lock ends with the process, whatever ends it.
    """

    def refuse(holder: str) -> None:
        raise UsageError(
            f"{folder}: another {user} is writing there ({holder}); wait for it or end it, or name another --out"
        )

    make_folder(folder)
    with locked(folder / LOCK, refuse):
        yield


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
        return disk_full(f"{option}: {folder}")
    found = "a file in its place" if error.errno == errno.ENOTDIR else str(error.strerror).lower()
    return UsageError(f"{option}: {folder}: expected a folder that can be written to, found: {found}; name another")


def require_file_place(path: Path) -> None:
    """Make the folders above a file that is to be written; UsageError where a folder has its name, or none can be."""
    if path.is_dir():
        raise UsageError(f"{path}: expected the name of a file to write, found a folder; name another")
    make_folder(path.parent)


@contextmanager
def whole_file(path: Path, *, new: bool = False, durable: bool = False, private: bool = False) -> Iterator[Path]:
    """Yield a place to write a file at, which becomes ``path`` once the block is done; of a failure nothing is left.

    Folders above it are made; options as of `maesil.atomic.named_when_whole`. Several may write a ``new`` or
    ``private`` file at once. Any other has one writer at a time, who takes the place that a killed one left.
    """
    require_file_place(path)
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    partial = hidden if new or private else path.with_name(path.name + ".partial")
    with named_when_whole(path, partial, new=new, durable=durable, private=private):
        yield partial


def write_whole(path: Path, data: str | bytes, *, private: bool = False) -> None:
    """Write or replace a file, text in UTF-8, with the folders above it; ``private`` as of `whole_file`."""
    with whole_file(path, private=private) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def results_at_once(folder: Path) -> Iterator[Path]:
    """Yield a folder to write files in, which come to lie in ``folder`` once the block is done; else none of them."""
    make_folder(folder)
    with TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        yield Path(scratch)
        for path in Path(scratch).iterdir():
            os.replace(path, folder / path.name)
