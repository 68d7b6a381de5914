"""Decoding in a child process with limits of memory, processor and wall-clock time.

Decoders are C and Rust, fed with files from anywhere: a crash, or a file that unpacks without end, costs one volume and
never the run. One child lives as long as its process and is replaced after a failure. It gives voxels back through
shared memory and everything else as JSON, so that nothing it says is executed; it dies with its parent.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from maesil.errors import Refused
from maesil.ingest.failures import MAY_PASS, as_refusal
from maesil.ingest.fetched import brought_here
from maesil.ingest.messages import (
    Answer,
    Decoded,
    Digests,
    DigestSlices,
    Failure,
    Hash,
    HashSource,
    Limits,
    ReadSource,
    Request,
    answer_from_json,
    receive,
    request_to_json,
    send,
)
from maesil.ingest.planes import TemporaryFile, temporary_file
from maesil.ingest.scanned import SCANNED_BYTES, Scanned, scanned_on_disk
from maesil.ingest.source import Source
from maesil.ingest.source_path import SourcePath
from maesil.types import Planes

MEMORY_BYTES = 1 << 29
"""What a child may take beside the voxels that the plan knows of."""
_COPIES_OF_A_SLICE = 16
"""So many times a slice lies in memory where the voxels lie on disk: encoded, as stored, in double precision, as HU."""
SECONDS = 120.0
SECONDS_PER_BYTE = 1e-6
CPU_SHARE = 0.5
"""Of the wall-clock limit."""
PAUSE_SECONDS = 0.5
"""Until a source is asked for again."""


def read(source: Source) -> Scanned:
    """Decode a source to HU on its own grid, as `maesil.ingest.decode.read`."""
    return read_hashed(source, "known")[0]


def read_hashed(source: Source, known: str = "", folder: Path | None = None) -> tuple[Scanned, str]:
    """Return the decoded source and its hash: the known one, or else one of the very bytes that were decoded.

    The voxels of a long source lie in a temporary file in ``folder``, those of others in memory.
    """
    answer, descriptor, file = _asked(lambda here: ReadSource(here, known), source, folder)
    assert isinstance(answer, Decoded)
    received = _received(descriptor, answer.shape) if file is None else scanned_on_disk(file, folder, answer.shape)
    return Scanned(*received, answer.affine, answer.notes, answer.source), answer.hash


def source_hash(source: Source, folder: Path | None = None) -> str:
    """Return the hash of a source, as `maesil.ingest.decode.source_hash`."""
    answer, _, _ = _asked(HashSource, source, folder)
    assert isinstance(answer, Hash)
    return answer.hash


def hu_digests(path: SourcePath, frames: Sequence[int | None], decoded_bytes: int) -> list[bytes]:
    """Return the digests of slices of one file, as `maesil.ingest.dicom.hu_digests`."""
    file = Source("slices", (path,), decoded_bytes=decoded_bytes)
    answer, _, _ = _asked(lambda here: DigestSlices(here.paths[0], tuple(frames)), file)
    assert isinstance(answer, Digests)
    return list(answer.digests)


def _asked(
    make: Callable[[Source], Request], source: Source, folder: Path | None = None
) -> tuple[Answer, int | None, TemporaryFile | None]:
    """Return what the child answers to a request, a descriptor it may have sent, and the file that took the voxels.

    Where it fails for a reason that may pass, it is asked once more: a fault of a moment must cost no volume.
    """
    for last in (False, True):
        try:
            file = _file_for(source, folder)
            with brought_here(source) as here:
                return *_child().ask(make(here), source, file), file
        except Exception as error:
            if last or as_refusal(error).code not in MAY_PASS:
                raise
        time.sleep(PAUSE_SECONDS)
    raise AssertionError("the last try returns or raises")


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


class Child:
    """A process that decodes for this one; started when first asked."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def ask(self, request: Request, source: Source, file: TemporaryFile | None = None) -> tuple[Answer, int | None]:
        """Return the child's answer and, where it sends one, the descriptor of shared memory with the voxels.

        With a ``file`` it writes the voxels there. Raises what the child raised; `Refused` if it died or took more than
        its limits.
        """
        wall = SECONDS + SECONDS_PER_BYTE * source.decoded_bytes
        voxels = 3 * source.decoded_bytes if file is None else _COPIES_OF_A_SLICE * source.slice_bytes
        limits = Limits(MEMORY_BYTES + voxels, cpu_seconds=int(CPU_SHARE * wall))
        with self._lock:
            connection = self._connected()
            connection.settimeout(wall)
            try:
                send(connection, request_to_json(request, limits), [] if file is None else [file.fileno()])
                document, descriptor = receive(connection)
            except TimeoutError:
                self.stop()
                raise Refused("decode_time", f"decoding took more than {wall:.0f} s and was ended") from None
            except (OSError, EOFError):
                raise self._death(wall) from None
            except BaseException:  # interrupted: what it answers must not be taken for the next answer
                self.stop()
                raise
        answer = answer_from_json(document)
        if isinstance(answer, Failure):
            raise answer.error()
        return answer, descriptor

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


_children: list[Child] = []


def _child() -> Child:
    """Return this process's child: one of a forked parent is not ours to talk to."""
    if not _children or _children[0].owner != os.getpid():
        _children[:] = [Child()]
        atexit.register(_children[0].stop)
    return _children[0]
