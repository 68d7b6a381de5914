"""The child process of `maesil.ingest.isolated`: waits for a request, decodes within its limits, answers."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
import socket
import sys
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from maesil.errors import Refused
from maesil.ingest import decode
from maesil.ingest.dicom import hu_digests
from maesil.ingest.isolated import map_shared
from maesil.ingest.messages import (
    Answer,
    Decoded,
    Digests,
    DigestSlices,
    Failure,
    Hash,
    HashSource,
    Limits,
    Request,
    answer_to_json,
    receive,
    request_from_json,
    send,
)
from maesil.ingest.planes import TemporaryFile
from maesil.ingest.scanned import SCANNED_BYTES, scanned_on_disk
from maesil.types import Planes, Zyx

_PR_SET_PDEATHSIG = 1


class _Shared:
    """Room for one volume: shared memory, or the file that the other side sent."""

    def __init__(self, descriptor: int | None) -> None:
        self.file = None if descriptor is None else TemporaryFile(descriptor)
        self.descriptor: int | None = None

    def allocate(self, shape: Zyx) -> tuple[Planes, Planes]:
        if self.file is not None:
            return scanned_on_disk(self.file, None, shape)
        voxels = int(np.prod([int(n) for n in shape]))
        self.descriptor = os.memfd_create("volume", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, SCANNED_BYTES * voxels)
        memory = map_shared(self.descriptor, SCANNED_BYTES * voxels)
        hu = np.frombuffer(memory, dtype=np.float32, count=voxels).reshape(shape)
        return hu, np.frombuffer(memory, dtype=bool, count=voxels, offset=4 * voxels).reshape(shape)

    def close(self) -> None:
        self.file = None  # it is gone as soon as neither side has it
        if self.descriptor is not None:
            os.close(self.descriptor)


def main(descriptor: int, parent: int) -> None:
    """Serve requests until the other side is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be tied to
        return
    for request_to_end in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle: it may want to finish its volume
        signal.signal(request_to_end, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    connection = socket.socket(fileno=descriptor)
    while True:
        try:
            document, room = receive(connection)
        except (EOFError, OSError):
            return
        shared = _Shared(room)
        answer = answer_to_json(_answer(document, shared))
        send(connection, answer, [] if shared.descriptor is None else [shared.descriptor])
        shared.close()


def _answer(document: dict[str, Any], shared: _Shared) -> Answer:
    try:
        request, limits = request_from_json(document)
        _limit(limits)
        return _carry_out(request, shared)
    except Refused as refusal:
        return Failure("refused", refusal.code, refusal.detail, refusal.numbers)
    except MemoryError:
        return Failure("memory")
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        return Failure("refused", "damaged_file", f"the file cannot be read to its end ({error})")
    except OSError as error:
        if error.errno == errno.ENOMEM:  # what mmap calls it
            return Failure("memory")
        return Failure("os_error", str(error.errno or 0), error.strerror or str(error))
    except Exception as error:
        # Its text may quote the header, and a refusal is written into the store.
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        return Failure("unexpected", detail=f"{type(error).__name__} in {where}")


def _carry_out(request: Request, shared: _Shared) -> Answer:
    if isinstance(request, DigestSlices):
        return Digests(tuple(hu_digests(request.path, request.frames)))
    if isinstance(request, HashSource):
        return Hash(decode.source_hash(request.source, shared.allocate))
    scan, found = decode.read_hashed(request.source, shared.allocate, request.known_hash)
    return Decoded(scan.shape, scan.affine, scan.notes, scan.source, found)


def _limit(limits: Limits) -> None:
    """Allow so much more address space and processor time than has been taken by now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _soft(resource.RLIMIT_AS, pages * mmap.PAGESIZE + limits.memory_bytes)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _soft(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + limits.cpu_seconds)


def _soft(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
