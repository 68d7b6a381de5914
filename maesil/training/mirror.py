"""A run folder at a second place, most often a URL: what a machine that goes away leaves to the next one.

After each checkpoint the files of the run that changed are copied there, the checkpoint last. So whatever ends a copy
half way, the mirror holds a run that can go on. A network that fails costs the copy, never the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from maesil.errors import MaesilError, UsageError
from maesil.files import LOCK, write_whole
from maesil.store.backends import open_storage
from maesil.store.storage import Storage
from maesil.store.urls import StorePlace
from maesil.training.checkpoint import CHECKPOINT, has_checkpoint
from maesil.training.kept import BEST
from maesil.training.log import METRICS

_COPIED = (".json", ".jsonl", ".toml", ".parquet", ".pt")
"""What a run needs to go on or to be used; pictures and traces stay."""


def bring_back(place: StorePlace, out: Path, *, resume: bool) -> str:
    """Copy a mirrored run to a run folder without a checkpoint; return a line that says so, or nothing.

    UsageError where the run would overwrite another one that is mirrored there; errors of storage as of
    `maesil.store.storage`.
    """
    storage = open_storage(place)
    if not storage.exists(CHECKPOINT):
        return ""
    if has_checkpoint(out):
        _require_same_run(place, storage, out)
        return ""
    if not resume:
        raise UsageError(
            f"--mirror: {place} holds the checkpoint of a run; --resume goes on with it, or name another place"
        )
    for key in sorted(filter(_is_copied, storage.list("")), key=_checkpoint_last):
        write_whole(out / key, storage.read(key))
    return f"{out}: brought back from {place}"


def _require_same_run(place: StorePlace, storage: Storage, out: Path) -> None:
    """Raise UsageError where the mirror is that of another run: its first record was measured by another one."""
    if not (storage.exists(METRICS) and (out / METRICS).exists()):
        return
    theirs, ours = (text.partition(b"\n")[0] for text in (storage.read(METRICS), (out / METRICS).read_bytes()))
    if theirs and ours and theirs != ours:
        raise UsageError(f"--mirror: {place} holds another run than {out}; name a place of its own for each run")


class Mirror:
    """The second place of a run on its way; ``tell`` is given a line where a copy fails."""

    def __init__(self, place: StorePlace, out: Path, tell: Callable[[str], None]) -> None:
        self._storage, self._out, self._tell = open_storage(place), out, tell
        self._copied: dict[str, tuple[int, int]] = {}

    def copy(self) -> None:
        """Copy the files that changed since the last copy."""
        try:
            for key in sorted(_files(self._out), key=_checkpoint_last):
                status = (self._out / key).stat()
                stamp = (status.st_size, status.st_mtime_ns)
                if self._copied.get(key) != stamp:
                    self._storage.put(key, (self._out / key).read_bytes())
                    self._copied[key] = stamp
        except (MaesilError, OSError) as error:
            self._tell(f"--mirror: this checkpoint was not copied ({error}); the next one is tried again")


def _files(out: Path) -> Iterator[str]:
    for path in (*out.iterdir(), *(out / BEST).glob("*")):
        if _is_copied(key := path.relative_to(out).as_posix()) and path.is_file():
            yield key


def _is_copied(key: str) -> bool:
    """Return whether a file belongs to the mirror; a key that leads out of the run folder does not."""
    folder, _, name = key.rpartition("/")
    return folder in ("", BEST) and name.endswith(_COPIED) and name != LOCK


def _checkpoint_last(key: str) -> tuple[bool, bool, str]:
    return key == CHECKPOINT, key.endswith(CHECKPOINT), key
