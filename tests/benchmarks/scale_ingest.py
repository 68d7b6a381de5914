"""Ingest of millions of files: memory of the driver, time, restart; and many tiny series by several parts at once.

    python tests/benchmarks/scale_ingest.py headers [--number 100000 1000000]
    python tests/benchmarks/scale_ingest.py parts [--series 60000] [--parts 4] [--bucket]

``headers`` lists and reads no file: below the reader of headers stands a generator, which gives series of 200 slices.
All above it is real: tables, checksums, plan, verdicts. The process is killed at half of the scan, and a
second one goes on; a third does everything at once. ``parts`` writes NIfTI files of 16^3 voxels, one volume each, and
runs the command once for each part, all at once, from a folder or from a bucket on loopback (moto's server).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from maesil.ingest import scan_tables, shared_scan
from maesil.ingest.header import CT_IMAGE, InstanceHeader
from maesil.ingest.options import IngestOptions
from maesil.ingest.planning import planned_on_disk
from maesil.ingest.scan import ScanResult
from maesil.ingest.verdict import FileVerdict
from maesil.ingest.verdict_tables import Verdicts
from maesil.store.nifti import write_nifti
from maesil.store.recipe import Recipe
from maesil.store.store import Store

SLICES = 200
_PLAIN = InstanceHeader(
    path=Path("/"), sop_class=CT_IMAGE, patient="", study="", series="", modality="CT",
    image_type=("ORIGINAL", "PRIMARY", "AXIAL"), rows=512, columns=512, frames=1, position=None,
    orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), pixel_spacing=(0.7, 0.7),
    acquisition=("1", "120", "B40f", *[""] * 8), transfer_syntax="1.2.840.10008.1.2.1",
    technical={"KVP": 120.0, "Manufacturer": "MAKER", "ConvolutionKernel": "B40f"},
)  # fmt: skip


def _files(number: int) -> Iterator[Path]:
    for n in range(number):
        yield Path(f"/archive/patient{n // SLICES // 2:06d}/series{n // SLICES:06d}/slice{n % SLICES:04d}.dcm")


def _header(path: Path) -> InstanceHeader:
    series, k = int(path.parent.name[6:]), int(path.stem[5:])
    uid = f"1.2.826.0.1.3680043.8.498.{series:012d}"
    weak = (*[""] * 6, f"{100000 + k}.{series % 1000}", *[""] * 4, f"{100001 + k}", "")
    said = {"patient": f"P{series // 2}", "study": f"{uid}.1", "series": f"{uid}.2", "weak": weak}
    return replace(_PLAIN, path=path, position=(-180.0, -180.0, 1.25 * k), **said)


def _resident_mb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def _drive(number: int, work: Path, kill_at: int, answers: Any) -> None:
    """Plan so many made-up headers in this process; end it after ``kill_at`` of them."""

    def look(path: Any, result: ScanResult, *, follow_links: bool) -> None:
        result.instances.append(_header(path))

    shared_scan.find_files = lambda *_, **__: _files(number)
    shared_scan.look_at_listed = look
    scan_tables.stamp_text = lambda *_, **__: "1 1"
    started, begun, read = time.perf_counter(), {}, 0

    def progress(stage: str, done: int, total: int | None) -> None:
        nonlocal read
        begun.setdefault(stage, time.perf_counter() - started)
        read += stage == "scan"
        if total and done % max(1, total // 10) == 0:
            print(f"{stage} {done} of {total}: {_resident_mb()} MB", file=sys.stderr, flush=True)
        if stage == "scan" and done == kill_at:
            os.kill(os.getpid(), 9)

    options = IngestOptions(workers=0, cache_folder=work / "cache")
    plan, shared = planned_on_disk([work], Recipe(), options, progress, lambda line: None)
    verdicts = Verdicts()
    verdicts.extend(FileVerdict(path, "used", "planned") for item in plan.volumes for path in item.source.paths)
    verdicts.settle()
    assert verdicts.are_one_for_each(_files(number))
    shared.discard()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - started
    answers.put(
        {"files": number, "volumes": len(plan.volumes), "headers read": read, "peak MB": round(peak),
         "stages began at": {name: round(at, 1) for name, at in begun.items()},
         "seconds": round(seconds, 1), "of the processor": round(time.process_time(), 1)}
    )  # fmt: skip


def headers(number: int) -> Iterator[dict[str, Any]]:
    """Yield what a whole scan took, and what one took that went on after a kill at half."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for way, kill_at in (("whole", 0), ("killed at half", number // 2), ("gone on with", 0)):
            answers = context.Queue()
            process = context.Process(target=_drive, args=(number, Path(folder), kill_at, answers))
            process.start()
            if not kill_at:
                yield {"way": way} | answers.get()
            process.join()


def parts(series: int, count: int, *, bucket: bool) -> dict[str, Any]:
    """Return what it took to ingest tiny volumes by several processes of the command at once.

    Where a volume is missing, all that was made stays: the log of each process, report, store and cache.
    """
    work = Path(tempfile.mkdtemp(prefix="scale-ingest-"))
    server_before = _of_children()
    with ExitStack() as held:
        _write_series(work / "in", series)
        source, environment = str(work / "in"), {**os.environ, "MAESIL_CACHE": str(work / "cache")}
        if bucket:
            source, more = _uploaded(work / "in", held)
            environment |= more
        (work / "key").write_text("a" * 64)
        command = [sys.executable, "-m", "maesil", "ingest", source, "--out", str(work / "store.zarr")]
        command += ["--workers", "0", "--spacing", "native", "--superpatch", "16", "--key-file", str(work / "key")]
        started = time.perf_counter()
        running = []
        for n in range(count):
            with (work / f"part{n}.log").open("wb") as log:
                running.append(
                    subprocess.Popen([*command, "--partition", f"{n}/{count}"], env=environment, stdout=log, stderr=log)
                )
        ended = [os.wait4(process.pid, 0)[1:] for process in running]
        seconds = round(time.perf_counter() - started, 1)
    made = len(Store.open(work / "store.zarr").volumes())
    codes = [os.waitstatus_to_exitcode(status) for status, _ in ended]
    used = [usage.ru_utime + usage.ru_stime for _, usage in ended]
    found = {
        "series": series, "parts": count, "bucket": bucket, "exit codes": codes, "seconds": seconds, "volumes": made,
        "of the processor": [round(one, 1) for one in used], "per series": round(sum(used) / series, 4),
        "of the server": round(_of_children() - server_before - sum(used), 1),
        "peak MB": [usage.ru_maxrss >> 10 for _, usage in ended],
        "left in the cache": sorted(path.suffix for path in (work / "cache" / "scans").iterdir()),
    }  # fmt: skip
    if made == series and not any(codes):
        shutil.rmtree(work)
        return found
    return found | {"logs and reports are in": str(work)}


def _of_children() -> float:
    """Return the processor's seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _write_series(into: Path, series: int) -> None:
    for number in range(series):
        hu = np.full((16, 16, 16), -1000, dtype=np.int16)
        # Noise makes each a scan of its own. Without it, a constant block would be taken for filling.
        hu[:, 4:12, 4:12] = np.random.default_rng(number).normal(40, 15, (16, 8, 8))
        folder = into / f"{number // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_nifti(folder / f"{number:06d}.nii.gz", hu, np.diag([5.0, 5.0, 5.0, 1.0]))


def _uploaded(folder: Path, held: ExitStack) -> tuple[str, dict[str, str]]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import obstore
    from support.object_server import environment, running_server
    from support.objects import bucket_store

    server = held.enter_context(running_server())
    bucket, variables = server.bucket(), environment(server.url)
    os.environ.update(variables)
    store = bucket_store(bucket)
    for path in sorted(folder.rglob("*.nii.gz")):
        obstore.put(store, f"in/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://{bucket}/in", variables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("headers", "parts"))
    parser.add_argument("--number", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--series", type=int, default=60_000)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--bucket", action="store_true")
    chosen = parser.parse_args()
    print(json.dumps({"machine": platform.platform(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}))
    if chosen.what == "parts":
        print(json.dumps(parts(chosen.series, chosen.parts, bucket=chosen.bucket)))
        return
    for number in chosen.number:
        for found in headers(number):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
