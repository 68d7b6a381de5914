"""Superpatches from object storage: through maesil, as raw GETs of the same ranges (the floor), and through zarr.

    PYTHONPATH=.:tests python tests/benchmarks/read_objects.py [--json FILE] [--latency-ms 20] [--gbit 1] [--peers]

Starts the server of the tests (moto, one Python process) and a proxy that adds latency and bounds the bandwidth, and
makes a store in it. ``--peers`` adds MONAI with fsspec, and LitData (``object_peers.py`` says what they need).
All ways read the same superpatches on as many threads, in turn, several times; the table gives medians. The server is
the same for all of them, and it is slow: ratios count, not MB/s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import obstore
import zarr
from support.object_server import environment, running_server
from support.stores import make_store

from maesil.cache.stage import Stage
from maesil.data.sources import FAR_READERS
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.store.urls import place_of

SHAPE, VOLUMES, ROUNDS = (256, 256, 256), 4, 5


def peak_begins() -> None:
    """Have the kernel forget the most memory that this process held."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the most memory (bytes resident) that this process held since."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def timed(act: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


class Ways:
    """What reads all superpatches of a store, each on as many threads."""

    def __init__(self, store: Store, local: Store, stage: Path) -> None:
        self.volumes, self.objects = store.volumes(), store.storage._objects
        self.patches = [(volume, patch) for volume in self.volumes for patch in volume.superpatches]
        views = {v.volume_id: store.storage.zarr(f"{v.prefix}/0", read_only=True) for v in self.volumes}
        self.arrays = {volume_id: zarr.open_array(view, mode="r") for volume_id, view in views.items()}
        self.reader, self.local = SuperpatchReader(store), SuperpatchReader(local)
        self.staged = SuperpatchReader(store, Stage(stage, 10**11).over(store.storage))

    @property
    def bytes(self) -> int:
        return sum(patch.length for _, patch in self.patches)

    def all(self, read: Callable[..., object]) -> float:
        with ThreadPoolExecutor(FAR_READERS) as pool:
            return timed(lambda: list(pool.map(lambda pair: read(*pair), self.patches)))

    def raw(self, _, patch) -> None:
        obstore.get_range(self.objects, patch.path, start=patch.offset, length=patch.length)

    def maesil(self, volume, patch) -> None:
        self.reader.borrow_superpatch(volume.volume_id, patch.index)

    def through_stage(self, volume, patch) -> None:
        self.staged.borrow_superpatch(volume.volume_id, patch.index)

    def from_disk(self, volume, patch) -> None:
        self.local.borrow_superpatch(volume.volume_id, patch.index)

    def through_zarr(self, volume, patch) -> np.ndarray:
        t = volume.tile
        z, y, x = (slice(i * t, (i + 1) * t) for i in patch.index)
        return self.arrays[volume.volume_id][z, y, x]


def measure(latency: float, bandwidth: float, *, with_peers: bool) -> dict[str, object]:
    """Return the medians of one latency (s) and bandwidth (bytes/s)."""
    with tempfile.TemporaryDirectory() as scratch, running_server() as server, server.proxy() as proxy:
        os.environ.update(environment(server.url))
        bucket = server.bucket()
        url, shapes = f"s3://{bucket}/store.zarr", [SHAPE] * VOLUMES
        make_store(place_of(url), shapes, superpatch=128)
        local = make_store(Path(scratch, "local.zarr"), shapes, superpatch=128)
        peers = None
        if with_peers:
            from object_peers import Peers

            bucket_of = obstore.store.from_url(f"s3://{bucket}", client_options={"allow_http": True})
            peers = Peers(local, bucket_of, bucket, Path(scratch))
        os.environ.update(environment(proxy.url))
        proxy.bandwidth = bandwidth
        proxy.latency = latency
        opened = timed(lambda: (store := Store.open(url)).volumes() and _first(store))
        requests = len(proxy.requests)
        ways = Ways(Store.open(url), local, Path(scratch, "stage"))
        first_epoch = ways.all(ways.through_stage)
        own = ("raw", "maesil", "through_zarr", "through_stage", "from_disk")
        acts = {name: partial(ways.all, getattr(ways, name)) for name in own}
        if peers is not None:
            acts |= {"monai": partial(timed, peers.monai), "litdata": partial(timed, peers.litdata)}
        rows, memory = {name: [] for name in acts}, dict.fromkeys(acts, 0)
        for number in range(ROUNDS):
            names = list(rows)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                peak_begins()
                rows[name].append(acts[name]())
                memory[name] = max(memory[name], peak())
        medians = {name: statistics.median(seconds) for name, seconds in rows.items()}
        return {
            "latency_ms": 1000 * latency, "superpatches": len(ways.patches), "bytes": ways.bytes,
            "first_superpatch_s": opened, "requests_to_it": requests, "first_epoch_staging_s": first_epoch,
            "seconds": medians, "peak_resident_bytes": memory, "bandwidth": bandwidth,
            "all_seconds": rows, "most_in_flight": proxy.most_in_flight,
        }  # fmt: skip


def _first(store: Store) -> object:
    reader = SuperpatchReader(store)
    volume = next(iter(reader.volumes.values()))
    return reader.read_superpatch(volume.volume_id, volume.superpatches[0].index)


def told(result: dict[str, object]) -> None:
    """Print one latency's table."""
    seconds, memory, size = result["seconds"], result["peak_resident_bytes"], result["bytes"] / 1e6
    print(f"latency {result['latency_ms']:g} ms, {result['superpatches']} superpatches, {size:.0f} MB encoded")
    print(f"open to first superpatch: {result['first_superpatch_s']:.2f} s, {result['requests_to_it']} requests")
    for name, one in seconds.items():
        rate, share = f"{size / one:.0f} MB/s", f"{seconds['raw'] / one:.0%} of raw"
        print(f"| {name} | {one:.3f} s | {rate} | {share} | {memory[name] / 1e9:.2f} GB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--latency-ms", type=float, nargs="*", default=[0.0, 20.0])
    parser.add_argument("--gbit", type=float, default=1.0, help="bandwidth of the line (Gb/s)")
    parser.add_argument("--peers", action="store_true")
    arguments = parser.parse_args()
    results = [
        measure(milliseconds / 1000, arguments.gbit * 1e9 / 8, with_peers=arguments.peers)
        for milliseconds in arguments.latency_ms
    ]
    for result in results:
        told(result)
    if arguments.json:
        machine = {"date": datetime.now(UTC).isoformat(), "cores": os.cpu_count(), "platform": platform.platform()}
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
