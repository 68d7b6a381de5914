"""What a store asks of the place where its files lie. Nothing else opens them.

Nothing is renamed or appended to, so that POSIX file systems, NFS and object stores behave alike: a record appears
whole under its final name or not at all. Keys are relative paths with ``/``.
`maesil.store.backends.open_storage` chooses what is meant by a path or a URL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from maesil.store.urls import StorePlace

if TYPE_CHECKING:
    import zarr.abc.store

TEMPORARY = ".tmp-"
"""How the names of files begin that are being written, or were when their process was killed."""
Stamp = tuple[int, int | str]
"""Size (bytes) of a file, and its time (ns) or its ETag: another one once the file was replaced."""

_COPIED_AT_ONCE = 8 << 20


class Storage(ABC):
    """The files below one place."""

    root: StorePlace

    @abstractmethod
    def require_writable(self, option: str) -> None:
        """Raise unless files can be written here and none replaces another; nothing is left behind.

        UsageError names the ``option``; ResourceError for a full disk, or a server that does not answer.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether a file or folder of this key is there; an empty key is the place itself."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Return the size of a file (bytes); `StoreError` if it is missing."""

    @abstractmethod
    def stamps(self, prefix: str) -> dict[str, Stamp]:
        """Return what `list` yields, sorted, and by what it is seen whether a file changed."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Return a whole file; `StoreError` if it is missing."""

    @abstractmethod
    def read_each(self, keys: Sequence[str]) -> Iterator[bytes]:
        """Yield whole files in the order of their keys, several on their way at once where that is faster."""

    def read_range(self, key: str, offset: int, length: int) -> bytearray:
        """Return ``length`` bytes from ``offset`` by one positioned read; `StoreError` if the file is shorter."""
        buffer = bytearray(length)
        self.read_into(key, offset, memoryview(buffer))
        return buffer

    @abstractmethod
    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill a caller's buffer (bytes) from ``offset`` by one positioned read; `StoreError` if the file is shorter.

        Any number of threads may read at once.
        """

    @abstractmethod
    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys of all files below a folder, sorted, without the temporary ones."""

    @abstractmethod
    def folders(self, prefix: str) -> Sequence[str]:
        """Return the names of the folders directly below one, sorted."""

    def names_two_below(self, prefix: str) -> set[str] | None:
        """Return the names of the folders in the folders below one; None where this would be a request for each."""
        return None

    @abstractmethod
    def last_change(self, key: str) -> float:
        """Return when a file, or anything in a folder, was last written (seconds since 1970)."""

    @abstractmethod
    def temporaries(self) -> Iterator[str]:
        """Yield the keys of files that were being written: by a process that still is at it, or was killed."""

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> bool:
        """Write a file that must not exist yet, durably and all at once; return False if another was first."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write or replace a file all at once. Only for what can be derived anew; records use `put_new`."""

    @abstractmethod
    def put_parts(self, key: str, parts: Iterable[bytes]) -> None:
        """Write a file that must not exist yet, part by part. For what nothing refers to before it was synced."""

    def link(self, key: str, new_key: str) -> None:
        """Give a file that is never altered a further name, which must not exist yet: a copy, where there are no links.

        For what nothing refers to before it was synced. `StoreError` if it is missing.
        """
        size = self.size(key)
        starts = range(0, size, _COPIED_AT_ONCE)
        self.put_parts(new_key, (bytes(self.read_range(key, at, min(_COPIED_AT_ONCE, size - at))) for at in starts))

    @abstractmethod
    def syncing(self, prefix: str) -> AbstractContextManager[None]:
        """Make everything below a folder, and the folder's own entry, durable before the block is left."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a folder and all in it, or a file; it may be missing already. For what nothing refers to any more.

        Whatever ends it half way, `last_change` of the folder around it says that something went.
        """

    @abstractmethod
    def zarr(self, prefix: str, *, read_only: bool) -> zarr.abc.store.Store:
        """Return the Zarr view of a folder."""
