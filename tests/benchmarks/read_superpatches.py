"""Reading superpatches from a warm page cache, one core: our reader, zarr-python, and a copy of memory as the floor.

    python tests/benchmarks/read_superpatches.py [--store STORE] [--json FILE]

Without a store one is made of synthetic patients in a temporary folder. All ways read the same superpatches in turn,
round by round, so that a drift of the machine's speed meets them alike; medians over rounds are shown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from numcodecs import blosc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.stores import make_store

from maesil.cache.reader import SuperpatchReader
from maesil.store import Store

ROUNDS = 9


def measure(store: Store) -> dict[str, object]:
    """Return median MB/s (decoded) of each way and the ratios of ours to them."""
    blosc.use_threads = False
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    reader = SuperpatchReader(store)
    places = [(v, patch.index) for v in reader.volumes.values() for patch in v.superpatches]
    arrays = {
        v.volume_id: zarr.open_array(store.storage.zarr(f"{v.prefix}/0", read_only=True), mode="r") for v, _ in places
    }
    edge = store.superpatch
    out, source = np.empty((edge,) * 3, np.int16), np.ones((edge,) * 3, np.int16)

    def through_zarr() -> None:
        for volume, index in places:
            arrays[volume.volume_id][tuple(slice(i * edge, (i + 1) * edge) for i in index)]

    ways: dict[str, Callable[[], object]] = {
        "memcpy": lambda: [np.copyto(out, source) for _ in places],
        "maesil": lambda: [reader.read_superpatch(v.volume_id, index, out) for v, index in places],
        "zarr-python": through_zarr,
    }
    seconds = {name: [] for name in ways}  # type: dict[str, list[float]]
    for _ in range(ROUNDS + 1):  # the first round warms the page cache
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    megabytes = out.nbytes * len(places) / 1e6
    speed = {name: megabytes / float(np.median(taken[1:])) for name, taken in seconds.items()}
    return {
        "superpatches": len(places),
        "edge": edge,
        "codec": store.recipe.codec,
        "megabytes_per_second": {name: round(value) for name, value in speed.items()},
        "ours_over_zarr_python": round(speed["maesil"] / speed["zarr-python"], 2),
        "ours_over_memcpy": round(speed["maesil"] / speed["memcpy"], 3),
    }


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        store = (
            Store.open(arguments.store)
            if arguments.store
            else make_store(Path(folder) / "s", [(256,) * 3] * 2, superpatch=128)
        )
        figures = measure(store)
    figures |= {"date": datetime.date.today().isoformat(), "machine": platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
