"""Decoding in a child process with limits of memory, processor and wall-clock time.

Decoders are C and Rust, fed with files from anywhere: a crash, or a file that unpacks without end, costs one volume and
never the run. One child lives as long as its process and is replaced after a failure. It gives voxels back through
shared memory and everything else as JSON, so that nothing it says is executed; it dies with its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maesil.errors import Refused
from maesil.ingest.planes import TemporaryFile, temporary_file
from maesil.ingest.scanned import SCANNED_BYTES, Scanned, scanned_on_disk
from maesil.ingest.source import Source
from maesil.types import Planes

MEMORY_BYTES = 1 << 29
"""What a child may take beside the voxels that the plan knows of."""
_COPIES_OF_A_SLICE = 16
"""So many times a slice is in memory where the voxels lie on disk: encoded, as stored, in double precision, as HU."""
SECONDS = 120.0
SECONDS_PER_BYTE = 1e-6
CPU_SHARE = 0.5
"""Of the wall-clock limit."""
_LENGTH = 4


def read(source: Source) -> Scanned:
    """Decode a source to HU on its own grid, as `maesil.ingest.decode.read`."""
    return read_hashed(source, "known")[0]


def read_hashed(source: Source, known: str = "", folder: Path | None = None) -> tuple[Scanned, str]:
    """Return the decoded source and its hash: the known one, or else one of the very bytes that were decoded.

    The voxels of a long source lie in a temporary file in ``folder``, those of others in memory.
    """
    file = _file_for(source, folder)
    answer, descriptor = _child().ask({"task": "read", "source": _document(source), "hash": known}, source, file)
    shape, affine = answer["shape"], np.asarray(answer["affine"], dtype=np.float64)
    hu, valid = _received(descriptor, shape) if file is None else scanned_on_disk(file, folder, shape)
    return Scanned(hu, valid, affine, tuple(answer["notes"]), answer["source"]), str(answer["hash"])


def source_hash(source: Source, folder: Path | None = None) -> str:
    """Return the hash of a source, as `maesil.ingest.decode.source_hash`."""
    request = {"task": "source_hash", "source": _document(source)}
    answer, _ = _child().ask(request, source, _file_for(source, folder))
    return str(answer["hash"])


def hu_digests(path: Path, frames: Sequence[int | None], decoded_bytes: int) -> list[bytes]:
    """Return the digests of slices of one file, as `maesil.ingest.dicom.hu_digests`."""
    file = Source("slices", (path,), decoded_bytes=decoded_bytes)
    answer, _ = _child().ask({"task": "hu_digests", "path": _for_the_child(path), "frames": list(frames)}, file)
    return [bytes.fromhex(digest) for digest in answer["hashes"]]


def _file_for(source: Source, folder: Path | None) -> TemporaryFile | None:
    """Return the file that takes the voxels of a long source."""
    return temporary_file(folder) if folder is not None and source.is_long else None


def _received(descriptor: int | None, shape: Sequence[int]) -> tuple[Planes, Planes]:
    """Return HU and valid voxels that came through shared memory."""
    assert descriptor is not None
    voxels = int(np.prod(shape))
    with contextlib.closing(os.fdopen(descriptor, "rb")):
        memory = map_shared(descriptor, SCANNED_BYTES * voxels)
    hu = np.frombuffer(memory, dtype=np.float32, count=voxels).reshape(shape)
    return hu, np.frombuffer(memory, dtype=bool, count=voxels, offset=4 * voxels).reshape(shape)


def map_shared(descriptor: int, size: int) -> mmap.mmap:
    """Map shared memory, all its pages at once; it stays as long as an array looks into it."""
    return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def _document(source: Source) -> dict[str, Any]:
    affine = None if source.affine is None else source.affine.tolist()
    return {
        "kind": source.kind,
        "paths": [_for_the_child(path) for path in source.paths],
        "planes": source.planes,
        "affine": affine,
        "technical": source.technical,
        "prefer": source.prefer,
    }


def _for_the_child(path: Path) -> str:
    """Return a path as the child finds it: it works where this process was when it started, which may have moved."""
    return str(path.absolute())


class Child:
    """A process that decodes for this one; started when first asked."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def ask(
        self, request: dict[str, Any], source: Source, file: TemporaryFile | None = None
    ) -> tuple[dict[str, Any], int | None]:
        """Return the child's answer and, where it sends one, the descriptor of shared memory with the voxels.

        With a ``file`` it writes the voxels there. Raises what the child raised; `Refused` if it died or took more than
        its limits.
        """
        wall = SECONDS + SECONDS_PER_BYTE * source.decoded_bytes
        voxels = 3 * source.decoded_bytes if file is None else _COPIES_OF_A_SLICE * source.slice_bytes
        limits = {"memory_bytes": MEMORY_BYTES + voxels, "cpu_seconds": int(CPU_SHARE * wall)}
        with self._lock:
            connection = self._connected()
            connection.settimeout(wall)
            try:
                send(connection, {**request, "limits": limits}, None if file is None else file.fileno())
                answer, descriptor = receive(connection)
            except TimeoutError:
                self.stop()
                raise Refused("decode_time", f"decoding took more than {wall:.0f} s and was ended") from None
            except (OSError, EOFError):
                raise self._death(wall) from None
            except BaseException:  # interrupted: what it answers must not be taken for the next answer
                self.stop()
                raise
        return _unless_raised(answer), descriptor

    def stop(self) -> int | None:
        """End the child; return its exit status if it had ended by itself."""
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.5)
        process.kill()
        process.wait()
        return None

    def _connected(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        if self._socket is None:
            ours, theirs = socket.socketpair()
            with theirs:
                # What this process can import, the child can; -P: what lies in the working directory, it shall not.
                environment = {
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                }
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "maesil.ingest.decode_child", str(theirs.fileno()), str(os.getpid())],
                    pass_fds=(theirs.fileno(),), env=environment,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            self._socket = ours
        return self._socket

    def _death(self, wall: float) -> Refused:
        status = self.stop()
        if status == -signal.SIGXCPU:
            return Refused("decode_time", f"decoding took more than {CPU_SHARE * wall:.0f} s of processor time")
        if status == -signal.SIGKILL:
            return Refused(
                "decoder_killed", "the process that decodes was killed from outside; most likely out of memory"
            )
        if status is None or status >= 0:  # no signal: it could not start, which is no source's fault
            return Refused("unexpected", f"the process that decodes ended by itself (status {status})")
        return Refused("decoder_crashed", f"the decoder crashed (signal {-status}) on this source; it is damaged")


def _unless_raised(answer: dict[str, Any]) -> dict[str, Any]:
    if "refused" in answer:
        code, detail, numbers = answer["refused"]
        raise Refused(code, detail, **numbers)
    if "os_error" in answer:
        raise OSError(*answer["os_error"])
    if "memory" in answer:
        raise Refused("decode_memory", "decoding took more memory than what the header claims can need")
    if "unexpected" in answer:
        raise Refused("unexpected", answer["unexpected"])
    return answer


def send(connection: socket.socket, document: dict[str, Any], descriptor: int | None = None) -> None:
    """Send a document and, with it, a descriptor."""
    data = json.dumps(document, default=_plain).encode()
    header = len(data).to_bytes(_LENGTH, "little")
    if descriptor is None:
        connection.sendall(header)
    else:
        socket.send_fds(connection, [header], [descriptor])
    connection.sendall(data)


def _plain(value: Any) -> Any:
    """Return a number of numpy as JSON knows it, anything else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None]:
    """Return a document and the descriptor that came with it; `EOFError` if the other side is gone."""
    header, descriptors, _, _ = socket.recv_fds(connection, _LENGTH, 1)
    if len(header) < _LENGTH:
        raise EOFError("the other side is gone")
    left, parts = int.from_bytes(header, "little"), []
    while left:
        if not (part := connection.recv(min(left, 1 << 20))):
            raise EOFError("the other side is gone")
        parts.append(part)
        left -= len(part)
    document: dict[str, Any] = json.loads(b"".join(parts))
    return document, descriptors[0] if descriptors else None


_children: list[Child] = []


def _child() -> Child:
    """Return this process's child: one of a forked parent is not ours to talk to."""
    if not _children or _children[0].owner != os.getpid():
        _children[:] = [Child()]
        atexit.register(_children[0].stop)
    return _children[0]
