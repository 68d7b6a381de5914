"""Files of a store below a folder of this machine: what POSIX file systems and NFS promise.

Nothing is renamed into place or appended to: a record appears whole under its final name or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from maesil.atomic import named_when_whole, sync
from maesil.errors import DISK_FULL, StoreError, disk_full
from maesil.files import require_writable
from maesil.store.storage import TEMPORARY, Stamp, Storage

if TYPE_CHECKING:
    import zarr.storage

_SYNCS_AT_ONCE = 8


class LocalStorage(Storage):
    """The files below one folder of this machine, or of what is mounted there."""

    def __init__(self, root: Path) -> None:
        self.root: Path = root

    def require_writable(self, option: str) -> None:
        """Raise unless files can be made and named here, by hard links."""
        require_writable(self.root, option, links=True)

    def exists(self, key: str) -> bool:
        """Return whether a file or folder of this key is there."""
        return (self.root / key).exists()

    def size(self, key: str) -> int:
        """Return the size of a file (bytes); `StoreError` if it is missing."""
        with _missing_is_damage(self.root / key):
            return (self.root / key).stat().st_size

    def stamps(self, prefix: str) -> dict[str, Stamp]:
        """Return what `list` yields, with size (bytes) and time (ns) of each."""
        found: dict[str, Stamp] = {}
        for key in self.list(prefix):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                status = (self.root / key).stat()
                found[key] = status.st_size, status.st_mtime_ns
        return found

    def read(self, key: str) -> bytes:
        """Return a whole file; `StoreError` if it is missing."""
        with _missing_is_damage(self.root / key):
            return (self.root / key).read_bytes()

    def read_each(self, keys: Sequence[str]) -> Iterator[bytes]:
        """Yield whole files, one after the other: small files of a disk gain nothing by threads."""
        return map(self.read, keys)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill a caller's buffer (bytes) from ``offset`` by one positioned read; `StoreError` if the file is shorter.

        The file is opened anew each time: one that was deleted meanwhile is missed at once, and nothing is shared
        between threads or across a fork.
        """
        length = len(buffer)
        with _missing_is_damage(self.root / key):
            descriptor = os.open(self.root / key, os.O_RDONLY | os.O_CLOEXEC)
            try:
                done = os.preadv(descriptor, [buffer], offset)
                while 0 < done < length and (more := os.preadv(descriptor, [buffer[done:]], offset + done)):
                    done += more
            finally:
                os.close(descriptor)
        if done != length:
            raise StoreError(f"{self.root / key}: expected {length} bytes at {offset}, found {done}; the file was cut")

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys of all files below a folder, sorted, without the temporary ones."""
        base = self.root / prefix
        for folder, subfolders, files in os.walk(base, onerror=_unless_missing):
            subfolders.sort()
            for name in sorted(files):
                if not name.startswith(TEMPORARY):
                    yield (Path(folder) / name).relative_to(self.root).as_posix()

    def folders(self, prefix: str) -> Sequence[str]:
        """Return the names of the folders directly below one, sorted."""
        base = self.root / prefix
        return sorted(path.name for path in base.iterdir() if path.is_dir()) if base.is_dir() else []

    def names_two_below(self, prefix: str) -> set[str] | None:
        """Return the names of the folders in the folders below one."""
        found: set[str] = set()
        for first in self.folders(prefix):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.root / prefix / first) as entries:
                found.update(entry.name for entry in entries if entry.is_dir())
        return found

    def last_change(self, key: str) -> float:
        """Return when a file, or anything in a folder, was last written (seconds since 1970)."""
        path = self.root / key
        with _missing_is_damage(path):
            return max(one.stat().st_mtime for one in (path, *path.rglob("*")))

    def temporaries(self) -> Iterator[str]:
        """Yield the keys of files that were being written: by a process that still is at it, or was killed."""
        for path in sorted(self.root.rglob(f"{TEMPORARY}*")):
            yield path.relative_to(self.root).as_posix()

    def put_new(self, key: str, data: bytes) -> bool:
        """Write a file that must not exist yet, durably and all at once; return False if another was first."""
        path = self.root / key
        try:
            self._put(path, data, new=True)
        except FileExistsError:
            return False
        return True

    def put(self, key: str, data: bytes) -> None:
        """Write or replace a file all at once. Only for what can be derived anew; records use `put_new`."""
        self._put(self.root / key, data, new=False)

    def put_parts(self, key: str, parts: Iterable[bytes]) -> None:
        """Write a file that must not exist yet, part by part. For what nothing refers to before it was synced."""
        path = self.root / key
        with _full_disk_is_resource_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                for part in parts:
                    file.write(part)

    def link(self, key: str, new_key: str) -> None:
        """Give a file a further name, which must not exist yet, by a hard link."""
        path = self.root / new_key
        with _missing_is_damage(self.root / key), _full_disk_is_resource_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(self.root / key)

    @contextlib.contextmanager
    def syncing(self, prefix: str) -> Iterator[None]:
        """Make everything below a folder, and the folder's own entry, durable (fsync) before the block is left."""
        base = self.root / prefix
        files, folders = [], [base.parent]
        for folder, _, names in os.walk(base):
            folders.append(Path(folder))
            files += [Path(folder) / name for name in names]
        # At once, since a file system that waits for several writes them together.
        with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
            synced = pool.map(sync, files)
            yield
            list(synced)
            list(pool.map(sync, folders))

    def remove(self, key: str) -> None:
        """Remove a folder and all in it, or a file; it may be missing already. For what nothing refers to any more."""
        path = self.root / key
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def zarr(self, prefix: str, *, read_only: bool) -> zarr.storage.LocalStore:
        """Return the Zarr view of a folder."""
        import zarr.storage  # a decoder's process needs files of a disk, and no arrays

        return zarr.storage.LocalStore(self.root / prefix, read_only=read_only)

    def _put(self, path: Path, data: bytes, *, new: bool) -> None:
        with _full_disk_is_resource_error(path):
            _make_folder(path.parent)
            temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
            with named_when_whole(path, temporary, new=new, durable=True):
                temporary.write_bytes(data)


def _make_folder(folder: Path) -> None:
    """Create a folder and the missing ones above it, durably: a file is not safe before the way to it is."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(f"{folder}: expected a folder of the store here, found a file; move it away") from error
    for path in missing:
        sync(path.parent)


def _unless_missing(error: OSError) -> None:
    """A folder that cannot be listed must not pass for an empty one."""
    if isinstance(error, NotADirectoryError):
        raise StoreError(f"{error.filename}: expected a folder of the store here, found a file; move it away")
    if not isinstance(error, FileNotFoundError):
        raise error


@contextlib.contextmanager
def _missing_is_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise StoreError(f"{path}: expected a file of the store here, found none; run `maesil store verify`") from error


@contextlib.contextmanager
def _full_disk_is_resource_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_full(path) from error
        raise
