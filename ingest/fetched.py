"""The objects of one source as files of this machine, for as long as it is decoded: all rules of reading stay one.

They lie in a folder of the process's own below TMPDIR, which only its user can read. What a killed process left there
goes when the next one begins.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from maesil.errors import ResourceError
from maesil.ingest.objects import fetch
from maesil.ingest.source import Source
from maesil.ingest.source_file import member_in, open_source, stamp_of
from maesil.ingest.source_path import ObjectFile
from maesil.locks import holder_of, locked

_LOCK = ".lock"
_MEMBER_AHEAD = 1 << 20
_BLOCK = 1 << 20


@contextmanager
def brought_here(source: Source) -> Iterator[Source]:
    """Yield a source whose files lie on this machine: itself, or one whose objects were fetched for this block.

    `Refused` where an object cannot be read; ResourceError where there is no room for all of them.
    """
    objects = [path for path in source.paths if isinstance(path, ObjectFile)]
    if not objects:
        yield source
        return
    with _folder(_size_of(objects)) as folder:
        here = {path: folder / _name(number, path, source.kind) for number, path in enumerate(objects)}
        fetch([(path, target) for path, target in here.items() if path.archive is None])
        _unpack([(path, target) for path, target in here.items() if path.archive is not None])
        paths = tuple(here[path] if isinstance(path, ObjectFile) else path for path in source.paths)
        yield replace(source, paths=paths)


def _name(number: int, path: ObjectFile, kind: str) -> str:
    """Return a name that says nothing of a patient; the two files of a NIfTI pair find each other by theirs."""
    if kind == "slices":
        return str(number)
    name = PurePosixPath(path.name)
    return "scan" + "".join(name.suffixes[-2 if name.suffix.lower() == ".gz" else -1 :])


def _size_of(objects: Sequence[ObjectFile]) -> int:
    return sum(stamp_of(path)[0] if path.archive is None else member_in(path)[1].file_size for path in objects)


def _unpack(members: Sequence[tuple[ObjectFile, Path]]) -> None:
    """Write members of archives to files; of an archive only the ranges of these are read."""
    for member, target in members:
        with open_source(member, _MEMBER_AHEAD) as stream, target.open("xb") as here:
            shutil.copyfileobj(stream, here, _BLOCK)


@contextmanager
def _folder(size: int) -> Iterator[Path]:
    """Yield a new folder with room for so many bytes, which is gone after the block."""
    root = _root()
    with ExitStack() as held:
        with locked(root / _LOCK):
            _remove_what_is_left(root, os.getpid())
            free = shutil.disk_usage(root).free
            if free < size:
                raise ResourceError(
                    f"{root}: expected room for the {size} bytes of one source, found {free}; set TMPDIR to a folder "
                    "with more, and run the same command again"
                )
            folder = root / uuid.uuid4().hex
            folder.mkdir(mode=0o700)
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            held.enter_context(locked(folder / _LOCK))
        yield folder


def _root() -> Path:
    """Return the folder of all that this user fetches; ResourceError where another user made one of its name."""
    root = Path(tempfile.gettempdir()) / f"maesil-fetched-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ResourceError(
            f"{root}: expected a folder that only you can read, found another; remove it, or set TMPDIR"
        )
    return root


@functools.lru_cache(maxsize=16)
def _remove_what_is_left(root: Path, process: int) -> None:
    """Remove the folders of processes that are gone: once in each process, before its first folder."""
    for folder in root.iterdir():
        if folder.is_dir() and holder_of(folder / _LOCK) is None:
            shutil.rmtree(folder, ignore_errors=True)
