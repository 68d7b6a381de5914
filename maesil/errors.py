"""Every error maesil raises on purpose, and the exit code the command line gives it.

A message says what was expected, what was found and what to do, and names the file or volume.
"""

from __future__ import annotations

import errno

from maesil.codes import RefusalCode

EXIT_OK = 0
EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_NO_INPUT = 3
EXIT_STORE = 4
EXIT_RESOURCES = 5
EXIT_SECURITY = 6
EXIT_INTERRUPTED = 130

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What an OSError says when there is no room left, on the disk or for this user."""
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
"""What an OSError says when a file or folder may not be used in this way."""
BROKEN = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EFBIG)
"""What an OSError says when the disk, the mount or the limits of this process fail."""
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
"""What an OSError says of a hard link on a file system that has none."""


class MaesilError(Exception):
    """The base of all errors that end a command with one line and a documented exit code."""

    exit_code = EXIT_REFUSED


class UsageError(MaesilError):
    """An option, a configuration value or a combination of them that cannot be carried out."""

    exit_code = EXIT_USAGE


class CheckpointError(UsageError):
    """A run folder or checkpoint that is missing, incomplete or of another shape than asked for."""


class NoInputError(MaesilError):
    """A source path that does not exist, or holds nothing usable."""

    exit_code = EXIT_NO_INPUT


class StoreError(MaesilError):
    """A store that is damaged, of another format, or no store at all."""

    exit_code = EXIT_STORE


class DamagedError(MaesilError):
    """A file that maesil wrote beside a store (scores, a split, the card of an encoder), cut short or altered since."""

    exit_code = EXIT_STORE


class ResourceError(MaesilError):
    """Out of disk, memory or workers."""

    exit_code = EXIT_RESOURCES


def disk_full(place: object = "") -> ResourceError:
    """Return the error for a disk without room, or a quota that is used up (`DISK_FULL`)."""
    where = f"{place}: " if place else ""
    return ResourceError(f"{where}the disk is full; free space and run the same command again")


class SecurityError(MaesilError):
    """A security limit was reached, or private data was found where none may be."""

    exit_code = EXIT_SECURITY


class InterruptedRun(MaesilError):
    """A run that was asked to end, and ended where the same command goes on."""

    exit_code = EXIT_INTERRUPTED


class EndedWithOthers(MaesilError):
    """A process that ends because one of those it trained with did, which has told the reason already."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


_SIGNS_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")
"""What torch, CUDA, cuBLAS and cuDNN say in errors that have no class of their own."""


def out_of_memory(error: BaseException) -> str:
    """Say in one line that and where memory ran out, if that is what an error means; else an empty string.

    Known by class and by words, so that nobody must import torch to ask.
    """
    told = " ".join(str(error).split())
    signs = any(sign in told.lower() for sign in _SIGNS_OF_MEMORY)
    if not (isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and signs)):
        return ""
    on_gpu = type(error).__name__ == "OutOfMemoryError" or any(word in told.lower() for word in ("cuda", "cudnn"))
    asked = next((part for part in told.split(". ") if "allocate" in part.lower()), told)
    return f"out of {'GPU ' if on_gpu else ''}memory" + (f" ({asked[:120]})" if asked else "")


class Refused(Exception):
    """One source (a series, a NIfTI file) that will not become a volume: a code, and the numbers why.

    It never ends a command: ingest catches it and writes it to the store's quarantine.
    """

    def __init__(self, code: RefusalCode, detail: str, **numbers: object) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.numbers = numbers

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not survive pickling by themselves; Dask pickles them.
        return (_rebuild_refused, (self.code, self.detail, self.numbers))


class ScanRefused(MaesilError):
    """One scan that a caller asked for by name and that ingest refuses; ``code`` is that of `Refused`."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (ScanRefused, (str(self), self.code))


def _rebuild_refused(code: RefusalCode, detail: str, numbers: dict[str, object]) -> Refused:
    return Refused(code, detail, **numbers)
