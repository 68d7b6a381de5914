"""The stage: superpatches of stores far away, kept on a disk of this machine as they are in their stores.

    STAGE/ab/cdef...   the encoded bytes of one superpatch, which end with their own checksum
          size         how many bytes all of them take
          locks/       held while a superpatch is fetched, and while the size changes

All processes of a machine share it: each superpatch is fetched and written once. Those not used for the longest time
go when the size is reached. Whatever kills a process leaves nothing that is taken for whole: files are named once
they are, and every one is checked as it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np

from maesil.atomic import named_when_whole
from maesil.errors import DISK_FULL, UsageError, disk_full
from maesil.files import make_folder, require_writable
from maesil.locks import locked
from maesil.store.reader import ReadInto
from maesil.store.storage import Storage

_SIZE, _PARTIAL = "size", ".partial-"
_LEFT_AFTER_S = 3600
_KEPT_SHARE = 0.95
"""Of the size that is left once superpatches had to go, so that not every further one has to look for others."""


class Stage:
    """A folder with copies of superpatches, of up to ``size`` bytes; safe for threads and processes."""

    def __init__(self, folder: Path, size: int) -> None:
        """UsageError where the folder cannot be written to, or holds something else; ResourceError without locks."""
        make_folder(folder)
        require_writable(folder, "--stage")
        others = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {"locks", _SIZE}
        if others and not (folder / _SIZE).exists():
            raise UsageError(f"--stage: {folder}: expected an empty folder or a stage, found other files; name another")
        self.folder, self.size = folder, size
        with self._size_locked():
            self._note(self._evict(size))  # what a kill left uncounted is counted again

    def over(self, storage: Storage) -> ReadInto:
        """Return what reads superpatches of a storage through this stage."""
        return partial(self._read_into, storage)

    @property
    def used(self) -> int:
        """Bytes that it takes."""
        return int((self.folder / _SIZE).read_text(encoding="ascii") or 0)

    def _read_into(self, storage: Storage, key: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the encoded bytes of one superpatch, from the stage or from the storage."""
        digest = hashlib.sha256(f"{storage.root}\0{key}\0{offset}\0{len(buffer)}".encode()).hexdigest()
        path = self.folder / digest[:2] / digest[2:]
        if _found(path, buffer):
            return
        with locked(self.folder / "locks" / digest[:3]):  # threads and processes that want the same one wait for it
            if not _found(path, buffer):
                storage.read_into(key, offset, buffer)
                if _is_whole(buffer):  # what is damaged in the store is for the reader to tell
                    self._keep(path, buffer)

    def _keep(self, path: Path, data: memoryview) -> None:
        if len(data) > self.size:
            return
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            with named_when_whole(path, path.with_name(f"{_PARTIAL}{path.name}")) as written:
                written.write_bytes(data)
                _used_now(written)
                with self._size_locked():
                    self._make_room(len(data))
        except OSError as error:
            if error.errno in DISK_FULL:
                raise disk_full(f"--stage-size: {self.folder}") from error
            raise

    def _make_room(self, length: int) -> None:
        """Count so many bytes more, and remove others where they would be too many."""
        used = self.used + length
        self._note(used if used <= self.size else length + self._evict(max(0, int(_KEPT_SHARE * self.size) - length)))

    def _evict(self, size: int) -> int:
        """Remove what was not used for the longest time until the rest takes ``size`` bytes; return what it takes."""
        held = sorted(self._held())
        used = sum(length for _, length, _ in held)
        for _, length, path in held:
            if used <= size:
                break
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            used -= length
        return used

    def _held(self) -> Iterator[tuple[int, int, str]]:
        """Yield when each superpatch was used last (ns), its bytes and its path; what killed writers left goes."""
        for folder in self.folder.glob("??/"):
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        if not entry.name.startswith(_PARTIAL):
                            yield status.st_mtime_ns, status.st_size, entry.path
                        elif status.st_mtime < time.time() - _LEFT_AFTER_S:
                            Path(entry.path).unlink()

    @contextmanager
    def _size_locked(self) -> Iterator[None]:
        with locked(self.folder / "locks" / _SIZE):
            yield

    def _note(self, used: int) -> None:
        with named_when_whole(self.folder / _SIZE, self.folder / f"{_PARTIAL}{_SIZE}") as written:
            written.write_text(str(used), encoding="ascii")


def _found(path: Path, buffer: memoryview) -> bool:
    """Fill a buffer from a staged file and note its use; False where there is none, or it is damaged: then it goes."""
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size == len(buffer) == file.readinto(buffer) and _is_whole(buffer):
                _used_now(file.fileno())
                return True
        path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    return False


def _used_now(file: int | Path) -> None:
    """Note when a file was used, to the nanosecond: the clock of a file system has ticks of several milliseconds."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _is_whole(encoded: memoryview) -> bool:
    """Return whether the encoded bytes of a superpatch are those that its checksum, their end, was made of."""
    return int(google_crc32c.value(np.frombuffer(encoded, np.uint8)[:-4])) == int.from_bytes(encoded[-4:], "little")
