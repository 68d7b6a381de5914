"""Files of a store in object storage (Amazon S3 and what speaks its language, Google, Azure), through obstore.

A request that the server has acknowledged is durable there: what fsync is for on a disk. A record is written by a
conditional PUT (``If-None-Match: *``), so that of several writers one wins. Every request is tried again within a
bounded time; a write of which nobody knows whether it arrived is told apart by the mark of its writer.
Credentials and endpoint come from the environment, and no message repeats them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import obstore
import zarr.storage
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from maesil.errors import MaesilError, ResourceError, StoreError, UsageError
from maesil.store.endpoint import endpoint_is_here, require_endpoint
from maesil.store.storage import TEMPORARY, Stamp, Storage
from maesil.store.urls import ObjectUrl

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

T = TypeVar("T")

PATIENCE = 120.0
"""Seconds for which a request is tried again before its error is told."""
_REQUEST_SECONDS = 60
_CONNECT_SECONDS = 10
_PART = 8 << 20
"""Bytes of one part of a multipart upload."""
_PARTS_AT_ONCE = 4
_WHOLE_UP_TO = 64 << 20
_READS_AT_ONCE = 32
_HELD = 1024
_WRITER = "maesilwriter"
"""Metadata of an object that says who wrote it: whose answer was lost asks by it whether it had won."""
_REFUSED = (PermissionDeniedError, UnauthenticatedError)
_FULL = re.compile(r"status code: 507|<Code>\w*(QuotaExceeded|StorageFull|InsufficientStorage)</Code>")
"""What a server without room says, in a code or by its status; Ceph says so by 403, as of wrong credentials."""
_CHANGED = ".changed"
_STATUS = "status code"
"""What an error of obstore says where the server answered."""
_NO_BUCKET = "NoSuchBucket"
_PAUSE = 0.1


class ObjectStorage(Storage):
    """The objects whose keys begin with one folder of a bucket. Of use in the process that made it alone."""

    def __init__(self, root: ObjectUrl, patience: float | None = None) -> None:
        self.root: ObjectUrl = root
        self.patience = PATIENCE if patience is None else patience
        self._process = os.getpid()
        self._objects = self._below("")

    def require_writable(self, option: str) -> None:
        """Raise unless objects can be written, and the server refuses a second one of a name that must be new."""
        key = f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with self.telling(""):
                first, second = self._create(key, b"1"), self._create(key, b"2")
                self._again(lambda: obstore.delete(self._objects, [key]))
        except MaesilError as error:
            raise type(error)(f"{option}: {error}") from error
        if not first or second:
            raise UsageError(
                f"{option}: {self.root}: the server takes a second object of a name that must be new (it ignores "
                "If-None-Match), so that two writers could replace each other's files; name a store on another one"
            )

    def exists(self, key: str) -> bool:
        """Return whether an object has this key, or any lies below it."""
        if key and self._is_object(key):
            return True
        with self.telling(key):
            return self._again(lambda: any(obstore.list(self._objects, key or None, chunk_size=1)))

    def _is_object(self, key: str) -> bool:
        with self.telling(key), contextlib.suppress(FileNotFoundError):
            return bool(self._again(lambda: obstore.head(self._objects, key)))
        return False

    def size(self, key: str) -> int:
        """Return the size of an object (bytes); `StoreError` if it is missing."""
        return self.status(key)["size"]

    def status(self, key: str) -> ObjectMeta:
        """Return path, size, ETag and time of an object; `StoreError` if it is missing."""
        with self.telling(key):
            return self._again(lambda: obstore.head(self._objects, key))

    def stamps(self, prefix: str) -> dict[str, Stamp]:
        """Return what `list` yields, sorted, with size and ETag of each: one request per 1,000 objects."""
        found = {one["path"]: (one["size"], one["e_tag"] or "") for one in self.listed(prefix)}
        return {key: found[key] for key in sorted(found) if not _is_temporary(key)}

    def read(self, key: str) -> bytes:
        """Return a whole object; `StoreError` if it is missing."""
        with self.telling(key):
            return self._again(lambda: bytes(obstore.get(self._objects, key).bytes()))

    def read_each(self, keys: Sequence[str]) -> Iterator[bytes]:
        """Yield whole objects in the order of their keys, many on their way at once."""
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for first in range(0, len(keys), _HELD):  # no more than that wait in memory
                yield from pool.map(self.read, keys[first : first + _HELD])

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill a caller's buffer (bytes) from ``offset`` by one ranged GET; `StoreError` if the object is shorter."""
        if not len(buffer):
            return
        with self.telling(key):
            found = self._again(lambda: obstore.get_range(self._objects, key, start=offset, length=len(buffer)))
            if len(found) != len(buffer):
                raise _cut(f"{self.root}/{key}", offset, len(buffer), len(found))
            buffer[:] = memoryview(found)

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys of all objects below a folder, sorted, without those that a probe left."""
        yield from self.stamps(prefix)

    def folders(self, prefix: str) -> Sequence[str]:
        """Return the names of the folders directly below one, sorted."""
        with self.telling(prefix):
            found = self._again(lambda: obstore.list_with_delimiter(self._objects, prefix))["common_prefixes"]
        return sorted(folder.rstrip("/").rpartition("/")[2] for folder in found)

    def last_change(self, key: str) -> float:
        """Return when an object, or anything in a folder, was last written, by the server's clock (since 1970)."""
        times = [one["last_modified"].timestamp() for one in self.listed(key)]
        if not times:
            times = [self.status(key)["last_modified"].timestamp()]
        return max(times)

    def temporaries(self) -> Iterator[str]:
        """Yield what probes left. Uploads that a kill cut off are no objects: the bucket's own rule removes those."""
        yield from sorted(one["path"] for one in self.listed("") if _is_temporary(one["path"]))

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object that must not exist yet, all at once; return False if another was first."""
        with self.telling(key):
            return self._create(key, data)

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object all at once. Only for what can be derived anew; records use `put_new`."""
        with self.telling(key):
            obstore.put(self._objects, key, data, use_multipart=len(data) > _WHOLE_UP_TO, chunk_size=_PART)

    def put_parts(self, key: str, parts: Iterable[bytes]) -> None:
        """Write an object that must not exist yet, part by part; of an upload that fails nothing stays."""
        if self._is_object(key):
            raise FileExistsError(f"{self.root}/{key}")
        blocks = _blocks(parts)
        start = [*zip(range(2), blocks, strict=False)]
        first = b"".join(block for _, block in start)
        with self.telling(key):
            if len(start) < 2:
                obstore.put(self._objects, key, first, use_multipart=False)
            else:
                whole = chain([first], blocks)
                obstore.put(
                    self._objects, key, whole, use_multipart=True, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE
                )

    def link(self, key: str, new_key: str) -> None:
        """Have the server copy an object that is never altered to a key that must not exist yet."""
        if self.exists(new_key):
            raise FileExistsError(f"{self.root}/{new_key}")
        with self.telling(key):
            self._again(lambda: obstore.copy(self._objects, key, new_key))

    @contextlib.contextmanager
    def syncing(self, prefix: str) -> Iterator[None]:
        """Do nothing: every write was acknowledged by the server before it was left, and is durable since."""
        yield

    def remove(self, key: str) -> None:
        """Remove all objects below a folder, or one object; it may be missing already."""
        folder = key.rpartition("/")[0]
        doomed = [one["path"] for one in self.listed(key)]
        with self.telling(key):
            if folder and doomed:  # a file system notes in a folder when something in it went
                with _also_without_room():
                    obstore.put(self._objects, f"{folder}/{_CHANGED}", b"", use_multipart=False)
            with contextlib.suppress(FileNotFoundError):
                self._again(lambda: obstore.delete(self._objects, doomed or [key]))

    def zarr(self, prefix: str, *, read_only: bool) -> zarr.storage.ObjectStore[ObjectStore]:
        """Return the Zarr view of a folder."""
        return _ZarrView(self, self._below(prefix), read_only=read_only)

    def _below(self, prefix: str) -> ObjectStore:
        """Return obstore's view of a folder; credentials and endpoint are those of the environment."""
        url = "/".join(part for part in (str(self.root), prefix) if part)
        patience = timedelta(seconds=self.patience)
        options: ClientConfig = {
            "timeout": timedelta(seconds=min(_REQUEST_SECONDS, self.patience)),
            "connect_timeout": timedelta(seconds=min(_CONNECT_SECONDS, self.patience)),
        }
        if self.root.scheme == "s3":
            require_endpoint()
            if endpoint_is_here():
                options["allow_http"] = True
        again: RetryConfig = {
            "max_retries": 12,
            "retry_timeout": patience,
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10)},
        }
        try:
            return from_url(url, client_options=options, retry_config=again)
        except (BaseError, ValueError) as error:
            raise UsageError(f"{self.root}: {_in_words(error)}; see docs/how-to/object-storage.md") from None

    def listed(self, prefix: str) -> Sequence[ObjectMeta]:
        """Return path, size, ETag and time of all objects below a folder: one request per 1,000 objects."""
        with self.telling(prefix):
            return self._again(lambda: [*chain.from_iterable(obstore.list(self._objects, prefix or None))])

    def _again(self, act: Callable[[], T]) -> T:
        """Do what may be done twice, and again where its answer broke off: obstore tries again before the answer."""
        end = time.monotonic() + self.patience
        while True:
            try:
                return act()
            except BaseError as error:
                if time.monotonic() > end or _STATUS in str(error):
                    raise
            time.sleep(_PAUSE)

    def _create(self, key: str, data: bytes) -> bool:
        """Write an object of a new name; where the answer is lost, ask who wrote what is there now."""
        mark, end = uuid.uuid4().hex, time.monotonic() + self.patience
        while True:
            try:
                obstore.put(self._objects, key, data, mode="create", use_multipart=False, attributes={_WRITER: mark})
                return True
            except AlreadyExistsError:
                with contextlib.suppress(FileNotFoundError):  # a conflict with a write that failed: again
                    return obstore.get(self._objects, key).attributes.get(_WRITER) == mark
            except BaseError as error:
                # obstore itself tries again what the server refused for now, and what cannot have arrived.
                if time.monotonic() > end or _STATUS in str(error):
                    raise
            time.sleep(_PAUSE)

    def _no_bucket(self) -> UsageError:
        return UsageError(f"{self.root}: expected a bucket of this name, found none; make it first")

    @contextlib.contextmanager
    def telling(self, key: str) -> Iterator[None]:
        """Have errors of obstore say in one line what is wrong, without what may hold a secret."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self.root}: object storage cannot be used in a process forked off meanwhile; "
                'start it another way (of a DataLoader: multiprocessing_context="forkserver")'
            )
        where = f"{self.root}/{key}" if key else str(self.root)
        try:
            yield
        except FileNotFoundError as error:
            if _NO_BUCKET in str(error):
                raise self._no_bucket() from None
            told = f"{where}: expected a file of the store here, found none; run `maesil store verify`"
            raise StoreError(told) from None
        except BaseError as error:
            if _NO_BUCKET in str(error):
                raise self._no_bucket() from None
            if _FULL.search(str(error)):
                raise ResourceError(
                    f"{where}: the storage is full ({_in_words(error)}); free space or have the quota raised, "
                    "and run the same command again"
                ) from None
            if isinstance(error, _REFUSED) or re.search(f"{_STATUS}: 40[13]", str(error)):
                raise UsageError(
                    f"{where}: the server refuses these credentials ({_in_words(error)}); "
                    "see docs/how-to/object-storage.md for the variables that give them"
                ) from None
            if f"{_STATUS}: 416" in str(error):
                raise StoreError(f"{where}: it ends before the bytes that were asked for; the file was cut") from None
            raise ResourceError(
                f"{where}: the server does not answer as it should ({_in_words(error)}); "
                "look at the network and the endpoint, and run the same command again"
            ) from None


class _ZarrView(zarr.storage.ObjectStore["ObjectStore"]):
    """What zarr-python sees: a folder of a store, whose errors are told as those of the storage are."""

    def __init__(self, storage: ObjectStorage, objects: ObjectStore, *, read_only: bool) -> None:
        super().__init__(objects, read_only=read_only)
        self._storage = storage

    def with_read_only(self, read_only: bool = False) -> _ZarrView:
        """Return the same view, for reading alone or not."""
        return _ZarrView(self._storage, self.store, read_only=read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a part of it, None where there is none."""
        return await self._told(key, lambda: super(_ZarrView, self).get(key, prototype, byte_range))

    async def exists(self, key: str) -> bool:
        """Return whether an object of this key is there."""
        return await self._told(key, lambda: super(_ZarrView, self).exists(key))

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object."""
        await self._told(key, lambda: super(_ZarrView, self).set(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object unless there is one."""
        await self._told(key, lambda: super(_ZarrView, self).set_if_not_exists(key, value))

    async def delete(self, key: str) -> None:
        """Remove an object."""
        await self._told(key, lambda: super(_ZarrView, self).delete(key))

    async def _told(self, key: str, act: Callable[[], Coroutine[None, None, T]]) -> T:
        end = time.monotonic() + self._storage.patience
        with self._storage.telling(key):
            while True:
                try:
                    return await act()
                except BaseError as error:
                    if time.monotonic() > end or _STATUS in str(error):
                        raise
                await asyncio.sleep(_PAUSE)


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith((TEMPORARY, _CHANGED))


@contextlib.contextmanager
def _also_without_room() -> Iterator[None]:
    """Leave out what a full server does not take: what is to go must go there, too."""
    try:
        yield
    except BaseError as error:
        if not _FULL.search(str(error)):
            raise


def _cut(where: str, offset: int, length: int, found: int) -> StoreError:
    return StoreError(f"{where}: expected {length} bytes at {offset}, found {found}; the file was cut")


def _blocks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the bytes of parts in blocks of at least a part of an upload; the last may be smaller."""
    held: list[bytes] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= _PART:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def _in_words(error: Exception) -> str:
    """Return what an error of obstore means, without URLs (they may be signed) and without what the server sent."""
    told = str(error).split("\n\nDebug source", 1)[0]
    code = re.search(r"<Code>(\w+)</Code>", told)
    status = re.search(r"status code: (\d+ [A-Z][A-Za-z ]*)", told)
    if status or code:
        return ", ".join(found[1] for found in (status, code) if found)
    told = re.sub(r"\s*\S+://\S+", " ...", told.splitlines()[0] if told else type(error).__name__)
    return told[:200]
