"""Real file systems for a test, mounted where this process may mount any (root on Linux); else the test is skipped."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Mount = Callable[..., Path]


@contextmanager
def mounting(root: Path) -> Iterator[Mount]:
    """Yield what runs a command that mounts a file system at PLACE, a folder of its own below ``root``."""
    mounted: list[Path] = []

    def mounts(*words: object) -> Path:
        place = root / f"mount{len(mounted)}"
        place.mkdir(exist_ok=True)
        command = [str(word).replace("PLACE", str(place)) for word in words]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"cannot mount here: {error}")
        mounted.append(place)
        return place

    yield mounts
    gc.collect()  # an error that nobody holds any more may hold a file
    for place in reversed(mounted):  # lazily: what was closed a moment ago may keep it busy
        subprocess.run(["umount", "--lazy", place], check=True, capture_output=True)
