"""How much memory this process may still take (Linux): of the machine, of every control group around it, of its job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_NO_LIMIT = 2**60
"""Version 1 of control groups says so, or more, where there is no limit."""


def available_memory(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> int:
    """Return how many bytes are free within every limit there is; ``root`` is where ``/proc`` and ``/sys`` lie.

    Limits: the machine's memory; control groups of version 1 and 2, nested, as of containers and batch systems; what
    SLURM says in the environment. Cached files that a group can drop count as free.
    """
    limits = [_of_the_machine(root), *_of_groups(root), *_of_slurm(root, environment)]
    return max(0, min(limits))


def _of_the_machine(root: Path) -> int:
    fields = dict(line.split(":") for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _of_groups(root: Path) -> Iterator[int]:
    """Yield what is free in the process's control group, and in each one around it."""
    own = _own_groups(root)
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            before, _, after = line.partition(" - ")
            kind, _, options = after.split()[:3]
            version = {"cgroup2": 2, "cgroup": 1}.get(kind)
            if version is None or version not in own or (version == 1 and "memory" not in options.split(",")):
                continue
            mounted_root, mount = (Path(name) for name in before.split()[3:5])
            place = root / mount.relative_to("/")
            # In a container the group's name may be the one outside, of which only the inner part is mounted.
            inner = own[version].relative_to(mounted_root) if own[version].is_relative_to(mounted_root) else Path()
            for folder in (place / inner, *(place / inner).parents):
                if folder.is_relative_to(place):
                    yield from _free_in(folder, version)


def _own_groups(root: Path) -> dict[int, Path]:
    """Return the group of this process by version: the one of the memory controller, and the one of version 2."""
    found = {}
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                found[1] = Path(path)
            elif number == "0":
                found[2] = Path(path)
    return found


def _free_in(group: Path, version: int) -> Iterator[int]:
    limits, used, cached = {
        1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
        2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    }[version]
    for name in limits:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            limit = int((group / name).read_text(encoding="ascii"))
            if limit < _NO_LIMIT:
                yield limit - int((group / used).read_text(encoding="ascii")) + _statistic(group, cached)


def _statistic(group: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        facts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return int(facts.get(name, 0))
    return 0


def _of_slurm(root: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """Yield what the job's memory leaves, as far as this process goes: not every cluster enforces it by groups."""
    with contextlib.suppress(OSError, ValueError):
        megabytes = int(environment.get("SLURM_MEM_PER_NODE", "0"))
        if not megabytes:
            cpus = int(environment.get("SLURM_CPUS_ON_NODE", "0"))
            megabytes = int(environment.get("SLURM_MEM_PER_CPU", "0")) * cpus
        if megabytes:  # 0: all of the node's
            pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[1])
            yield megabytes * 2**20 - pages * os.sysconf("SC_PAGE_SIZE")
