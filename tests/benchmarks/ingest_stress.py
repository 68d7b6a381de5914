"""Ingest where it hurts: many volumes, a huge tree, kills, flipped bits.

    python tests/benchmarks/ingest_stress.py memory [--number 10000]   # memory of the driver, few and many volumes
    python tests/benchmarks/ingest_stress.py tree [--number 100000]    # three series in so many small files
    python tests/benchmarks/ingest_stress.py kills [--number 20]       # SIGKILL, then undisturbed
    python tests/benchmarks/ingest_stress.py flips [--number 40]       # one flipped bit at a time

Everything is made in a temporary folder by the project's own generators and run through the command, as a user would.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from maesil.store.store import Store
from maesil.store.verify import verify
from maesil.synthetic.dicom import SeriesIdentity, ct_slice, write_dicom_series

SLICES = 16
FIRST = 900_000
"""Number that stands for a patient, a study and a series in their files."""


@contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="maesil-stress-") as folder:
        yield Path(folder)


def command(work: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "maesil", "ingest", *map(str, arguments), "--key-file", str(work / "key")]


def environment(work: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(work / "cache")}


def run(work: Path, *arguments: object) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """Return seconds, the largest resident size (MB) of the driver, and what it printed."""
    started = time.perf_counter()
    code = (
        "import resource, sys; from maesil.cli import app; "
        "import atexit; atexit.register(lambda: print('RSS', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)); "
        "app()"
    )
    full = command(work, *arguments)
    ended = subprocess.run(
        [sys.executable, "-c", code, *full[3:]], env=environment(work), capture_output=True, text=True
    )
    rss = int(next(line for line in reversed(ended.stdout.splitlines()) if line.startswith("RSS")).split()[1])
    return time.perf_counter() - started, rss / 1024, ended


def phantom(edge: int, slices: int, number: int) -> np.ndarray:
    """A body with lungs and bone in air, a little different each time."""
    z, y, x = np.ogrid[-1 : 1 : slices * 1j, -1 : 1 : edge * 1j, -1 : 1 : edge * 1j]
    hu = np.full((slices, edge, edge), -1000.0)
    hu[np.broadcast_to(y**2 + x**2 < 0.8, hu.shape)] = 40 + number % 50
    hu[np.broadcast_to((y**2 + (x - 0.4) ** 2 < 0.05) & (z < 2), hu.shape)] = -800
    hu[np.broadcast_to(((y - 0.5) ** 2 + x**2 < 0.02) & (z < 2), hu.shape)] = 700
    return hu


@functools.cache
def template(edge: int) -> tuple[bytes, ...]:
    """The files of one small series."""
    files, who = [], SeriesIdentity(patient=f"PATIENT-{FIRST}")
    for z, plane in enumerate(phantom(edge, SLICES, 0)):
        data = ct_slice(plane, [0, 0, 3.0 * z], [0, 10.0, 0], [10.0, 0, 0], z + 1, who)
        data.StudyInstanceUID, data.SeriesInstanceUID = f"1.2.3.{FIRST}", f"1.2.4.{FIRST}"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.5.{100 + z}.{FIRST}"
        buffer = io.BytesIO()
        data.save_as(buffer, enforce_file_format=True)
        files.append(buffer.getvalue())
    return tuple(files)


def small_series(folder: Path, number: int, edge: int = 16) -> None:
    """Write one series of a patient of its own; only the identities differ from series to series."""
    target = folder / f"{number // 1000:03}" / f"{number:06}"
    target.mkdir(parents=True)
    for z, data in enumerate(template(edge)):
        (target / f"{z:03}").write_bytes(data.replace(f"{FIRST}".encode(), f"{FIRST + number}".encode()))


def memory(volumes: int) -> dict[str, float]:
    with workplace() as work:
        for count in (10, volumes):
            for number in range(count):
                small_series(work / f"of-{count}", number)
        few_s, few, _ = run(work, work / "of-10", "--out", work / "s", "--dry-run")
        many_s, many, ended = run(work, work / f"of-{volumes}", "--out", work / "s", "--dry-run")
        print("\n".join(ended.stdout.splitlines()[-6:]))
    files = volumes * SLICES
    return {"volumes": volumes, "files": files, "driver MB, 10 volumes": few, "driver MB, all": many,
            "difference MB": many - few, "files a second": (files - 10 * SLICES) / (many_s - few_s)}  # fmt: skip


def tree(files: int) -> dict[str, float]:
    """Three series, each slice in another folder, among notes, tables, junk without a name, and empty files."""
    rng = random.Random(0)
    junk = [b"", b"id;age\n1;50\n", b"%PDF-1.4 nothing", rng.randbytes(700), b'{"a": 1}', b"\xff\xd8\xff\xe0 no jpeg"]
    with workplace() as work:
        for number in range(3):
            small_series(work / "series", number, edge=32)
        slices = sorted(path for path in (work / "series").rglob("*") if path.is_file())
        folders = [work / "tree" / f"{n // 300:02}" / f"{n:03}" for n in range(1000)]
        for folder in folders:
            folder.mkdir(parents=True)
        for number in range(files):
            name = rng.choice(["notes.txt", "IMG", "scan.dcm", "x.nii", "table.csv", "report.pdf"])
            (rng.choice(folders) / f"{number}-{name}").write_bytes(rng.choice(junk))
        for number, path in enumerate(slices):
            shutil.copy(path, rng.choice(folders) / f"slice-{number}")
        seconds, rss, ended = run(work, work / "tree", "--out", work / "store", "--spacing", "native", "--workers", "1")
        store = Store.open(work / "store")
        assert len(store.volumes()) == 3 and not verify(store).problems, ended.stdout + ended.stderr
        print(ended.stdout[:1500])
    return {
        "files": files + len(slices),
        "volumes": 3,
        "seconds": seconds,
        "driver MB": rss,
        "exit code": ended.returncode,
    }


def contents(store: Store) -> dict[str, tuple]:
    """What a store says, attempts and times apart."""
    return {
        v.volume_id: (v.source_hash, v.recipe_hash, v.shape, v.affine_lps, sorted(v.hu.items()),
                      [(p.index, p.crc32c, p.valid, p.body, p.air) for p in v.superpatches])
        for v in store.volumes()
    }  # fmt: skip


def eight_series(folder: Path) -> None:
    for number in range(8):
        who = SeriesIdentity(patient=f"P{number}", study=f"{number}")
        affine = np.array([[0.0, 0, 3.2, 0], [0, 3.2, 0, 0], [2.5, 0, 0, 0], [0, 0, 0, 1]])
        write_dicom_series(folder / f"{number}", phantom(96, 40, number), affine, who)


def kills(count: int) -> dict[str, float]:
    """All processes of an ingest with two workers are killed at a random moment, again and again."""
    rng = random.Random(1)
    with workplace() as work:
        eight_series(work / "src")
        options = ("--spacing", "2", "--superpatch", "32", "--workers", "2")
        seconds, _, _ = run(work, work / "src", "--out", work / "undisturbed", *options)
        expected = contents(Store.open(work / "undisturbed"))
        shutil.rmtree(work / "cache", ignore_errors=True)
        landed = halves = 0
        for _ in range(count):
            process = subprocess.Popen(
                command(work, work / "src", "--out", work / "store", *options), env=environment(work),
                start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            time.sleep(rng.uniform(0.1, 1.0) * seconds)
            landed += process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if (work / "store" / "zarr.json").exists():
                store = Store.open(work / "store")
                assert not verify(store).problems, "what is committed must be whole"
                halves += 0 < len(store.volumes()) < 8
                if len(store.volumes()) == 8 and rng.random() < 0.7:  # finished: begin again, or kills do nothing
                    shutil.rmtree(work / "store")
        _, _, ended = run(work, work / "src", "--out", work / "store", *options)
        equal = contents(Store.open(work / "store")) == expected and not verify(Store.open(work / "store")).problems
    assert equal and ended.returncode == 0, ended.stdout + ended.stderr
    return {"kills": count, "landed while running": landed, "left a store half full": halves, "commits equal": equal}


def flips(count: int) -> dict[str, float]:
    """One bit of a finished store is flipped at a time: a shard, a map, a commit, an array's metadata."""
    rng = random.Random(2)
    with workplace() as work:
        eight_series(work / "src")
        run(work, work / "src", "--out", work / "store", "--spacing", "2", "--superpatch", "32", "--workers", "2")
        store = work / "store"
        files = sorted(p for part in ("volumes", "commits") for p in (store / part).rglob("*") if p.is_file())
        weights = [path.stat().st_size for path in files]
        found = 0
        for _ in range(count):
            path = rng.choices(files, weights)[0] if rng.random() < 0.7 else rng.choice(files)
            data = bytearray(path.read_bytes())
            bit = rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            whole = path.read_bytes()
            path.write_bytes(data)
            verdict = subprocess.run(
                [sys.executable, "-m", "maesil", "store", "verify", str(store)], capture_output=True, text=True
            )
            found += verdict.returncode == 4
            if verdict.returncode != 4:
                print("not found:", path.relative_to(store), "bit", bit)
            path.write_bytes(whole)
    return {"flips": count, "found": found}


CHECKS = {"memory": (memory, 10_000), "tree": (tree, 100_000), "kills": (kills, 20), "flips": (flips, 40)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CHECKS)
    parser.add_argument("--number", type=int)
    chosen = parser.parse_args()
    check, usual = CHECKS[chosen.what]
    found = check(chosen.number or usual)
    print(json.dumps({name: round(value, 1) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
