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
from maesil.ingest.isolated import map_shared, receive, send
from maesil.ingest.planes import TemporaryFile
from maesil.ingest.scanned import SCANNED_BYTES, scanned_on_disk
from maesil.ingest.source import Source
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
            request, room = receive(connection)
        except (EOFError, OSError):
            return
        shared = _Shared(room)
        send(connection, _answer(request, shared), shared.descriptor)
        shared.close()


def _answer(request: dict[str, Any], shared: _Shared) -> dict[str, Any]:
    try:
        _limit(**request["limits"])
        return _carry_out(request, shared)
    except Refused as refusal:
        return {"refused": [refusal.code, refusal.detail, refusal.numbers]}
    except MemoryError:
        return {"memory": True}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        return {"refused": ["damaged_file", f"the file cannot be read to its end ({error})", {}]}
    except OSError as error:
        if error.errno == errno.ENOMEM:  # what mmap calls it
            return {"memory": True}
        return {"os_error": [error.errno or 0, error.strerror or str(error)]}
    except Exception as error:
        # Its text may quote the header, and a refusal is written into the store.
        last = traceback.extract_tb(error.__traceback__)[-1]
        return {"unexpected": f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"}


def _carry_out(request: dict[str, Any], shared: _Shared) -> dict[str, Any]:
    if request["task"] == "hu_digests":
        return {"hashes": [digest.hex() for digest in hu_digests(Path(request["path"]), request["frames"])]}
    source = _source(request["source"])
    if request["task"] == "source_hash":
        return {"hash": decode.source_hash(source, shared.allocate)}
    scan, found = decode.read_hashed(source, shared.allocate, request["hash"])
    affine = np.asarray(scan.affine).tolist()
    return {"shape": scan.shape, "affine": affine, "notes": list(scan.notes), "source": scan.source, "hash": found}


def _source(document: dict[str, Any]) -> Source:
    affine = document["affine"]
    return Source(
        kind=document["kind"],
        paths=tuple(map(Path, document["paths"])),
        planes=tuple(None if plane is None else (plane[0], plane[1]) for plane in document["planes"]),
        affine=None if affine is None else np.asarray(affine, dtype=np.float64),
        technical=document["technical"],
        prefer=document["prefer"],
    )


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    """Allow so much more address space and processor time than has been taken by now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _soft(resource.RLIMIT_AS, pages * mmap.PAGESIZE + memory_bytes)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _soft(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds)


def _soft(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
