"""Free memory is the least that any limit leaves: file systems of control groups as kernels show them, made by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maesil.cache.memory import available_memory

GB = 2**30
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
NO_LIMIT_V1 = "9223372036854771712"


def machine(root: Path, own: str, mounts: str, groups: dict[str, dict[str, object]], free: int = 64 * GB) -> Path:
    """A machine with so much free memory, and files in the folders of control groups."""
    files = {
        "proc/meminfo": f"MemTotal:  {128 * GB // 1024} kB\nMemAvailable:   {free // 1024} kB\n",
        "proc/self/cgroup": own,
        "proc/self/mountinfo": mounts,
        "proc/self/statm": f"5000 {GB // os.sysconf('SC_PAGE_SIZE')} 10 1 0 1 0\n",
    }
    for folder, some in groups.items():
        files |= {f"sys/fs/cgroup/{folder}/{name}": f"{value}\n" for name, value in some.items()}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


def v2(limit: object, used: int = 0, cached: int = 0, high: object = "max") -> dict[str, object]:
    return {
        "memory.max": limit, "memory.high": high, "memory.current": used,
        "memory.stat": f"anon 5\ninactive_file {cached}",
    }  # fmt: skip


def v1(limit: object, used: int = 0, cached: int = 0) -> dict[str, object]:
    return {
        "memory.limit_in_bytes": limit, "memory.usage_in_bytes": used,
        "memory.stat": f"inactive_file 7\ntotal_inactive_file {cached}",
    }  # fmt: skip


SLURM_V2 = "0::/system.slice/slurmstepd.scope/job_7/step_0/user\n"
SLURM_V1 = "9:memory:/slurm/uid_1/job_7/step_0\n3:cpuset:/\n0::/\n"
CASES = {
    "no group has a limit": (SLURM_V2, V2, {}, 64 * GB),
    "its own group": ("0::/a\n", V2, {"a": v2(8 * GB, 2 * GB)}, 6 * GB),
    "the job around the step": (
        SLURM_V2, V2,
        {
            "system.slice/slurmstepd.scope/job_7/step_0/user": v2("max", GB),
            "system.slice/slurmstepd.scope/job_7": v2(16 * GB, 5 * GB),
            "system.slice": v2(100 * GB, 5 * GB),
        },
        11 * GB,
    ),
    "an outer group with less left": ("0::/a/b\n", V2, {"a/b": v2(8 * GB, 0), "a": v2(10 * GB, 9 * GB)}, GB),
    "cached files can go": ("0::/a\n", V2, {"a": v2(8 * GB, 7 * GB, 3 * GB)}, 4 * GB),
    "throttled before it is full": ("0::/a\n", V2, {"a": v2(8 * GB, GB, high=5 * GB)}, 4 * GB),
    "used beyond its limit": ("0::/a\n", V2, {"a": v2(GB, 2 * GB)}, 0),
    "more than the machine has": ("0::/a\n", V2, {"a": v2(500 * GB)}, 64 * GB),
    "version 1, the job around the step": (
        SLURM_V1, V1,
        {"memory/slurm/uid_1/job_7/step_0": v1(NO_LIMIT_V1, GB), "memory/slurm/uid_1/job_7": v1(12 * GB, 4 * GB, GB)},
        9 * GB,
    ),
    "version 1, the root has no limit": ("9:memory:/\n", V1, {"memory": v1(NO_LIMIT_V1, 5 * GB)}, 64 * GB),
    "a container that sees its group as the root": (
        "0::/\n", V2, {".": v2(4 * GB, GB)}, 3 * GB,
    ),
    "a container whose group is named as outside": (
        "9:memory:/docker/abc\n", V1.replace("0:32 / ", "0:32 /docker/abc "), {"memory": v1(4 * GB, GB)}, 3 * GB,
    ),
    "both versions, memory in the first": (
        SLURM_V1, V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        {"memory/slurm/uid_1/job_7": v1(12 * GB, 2 * GB), "unified": {}}, 10 * GB,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "_"))
def test_the_least_that_any_group_leaves(tmp_path, case):
    own, mounts, groups, expected = CASES[case]
    assert available_memory(machine(tmp_path, own, mounts, groups), {}) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "16384"}, 15 * GB),  # one GB is taken by this process
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "4"}, 7 * GB),
        ({"SLURM_MEM_PER_NODE": "0"}, 64 * GB),
        ({"SLURM_MEM_PER_NODE": "1000000"}, 64 * GB),
        ({"SLURM_MEM_PER_NODE": "512"}, 0),
        ({"SLURM_MEM_PER_CPU": "2048"}, 64 * GB),
    ],
)
def test_what_slurm_grants_is_a_limit_too(tmp_path, environment, expected):
    assert available_memory(machine(tmp_path, "0::/\n", V2, {}), environment) == expected


def test_a_machine_without_control_groups(tmp_path):
    root = machine(tmp_path, "", "", {})
    (root / "proc/self/cgroup").unlink()
    (root / "proc/self/mountinfo").unlink()
    assert available_memory(root, {}) == 64 * GB


def test_this_very_machine_answers():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= total
