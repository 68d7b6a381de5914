"""A store of a million superpatches, faked: how long it takes to open, and what is done with its tables.

    PYTHONPATH=.:tests python tests/benchmarks/scale.py FOLDER [--volumes 60000] [--superpatches 17] [--json FILE]

Writes commits as ingest does, of shards that are not there, into FOLDER (it is used again if it is there). Each figure
comes from a process of its own, which has imported what it needs before the clock starts. Into the bucket go root,
recipe and table alone: opening reads nothing else. The server is that of the tests, behind a proxy that counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from support.many_volumes import fake_store, fake_volume

import maesil.store.reader
from maesil.config.schema import TrainConfig
from maesil.data.sampler import CropSampler
from maesil.data.sources import Sources
from maesil.data.split import split_patients
from maesil.store.duplicates import NEW, copies
from maesil.store.filters import select
from maesil.store.index import _superpatch_rows
from maesil.store.reader import SuperpatchReader
from maesil.store.store import TABLE_VERSION, Store
from maesil.store.thumbnails import Thumbnail

Figures = dict[str, Any]


@contextmanager
def seconds(figures: Figures, name: str) -> Iterator[None]:
    """Note the seconds that a block takes, and those of the processor, which other work disturbs less."""
    began, worked = time.perf_counter(), time.process_time()
    yield
    figures[name] = round(time.perf_counter() - began, 3)
    figures[f"{name}, CPU"] = round(time.process_time() - worked, 3)


def most_memory() -> int:
    """Return the most memory (MB) that this process held; what ``getrusage`` says begins with that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def opened(place: str) -> Figures:
    """Open a store, and make the reader of its superpatches."""
    figures: Figures = {}
    with seconds(figures, "seconds"):
        store = Store.open(place)
        reader = SuperpatchReader(store)
    figures["volumes"] = len(reader.volumes)
    figures["superpatches"] = sum(volume.count for volume in reader.volumes.values())
    with seconds(figures, "asked again"):
        store.volumes()
    return figures


def from_commits(place: str) -> Figures:
    """Open the same store by its commits, as one without a table is opened."""
    figures: Figures = {}
    store = Store.open(place)
    with seconds(figures, "seconds"):
        figures["volumes"] = len(store._committed())
    return figures


def added(place: str) -> Figures:
    """Commit one volume and take it into the table; what is written for the table."""
    figures: Figures = {}
    store = Store.open(place)
    volume = fake_volume(int(time.time()), store.recipe_hash)
    with seconds(figures, "commit"):
        store.commit(volume)
    before = set(store.storage.list("table"))
    with seconds(figures, "into the table"):
        store.keep_table(whole=False)
    new = set(store.storage.list("table")) - before
    figures["bytes written"] = sum(map(store.storage.size, new))
    with seconds(figures, "compared with all commits"):
        store.keep_table()
    return figures


def tables(place: str) -> Figures:
    """Make the columns of all superpatches, split patients, filter."""
    figures: Figures = {}
    volumes = Store.open(place).volumes()
    groups = {volume.group: volume.group for volume in volumes}
    with seconds(figures, "rows of all superpatches"):
        rows = _superpatch_rows(volumes, groups)
    with seconds(figures, "split of the patients"):
        split = split_patients(groups, 0.1, 0)
    figures["held out"] = len(split.validation)
    with seconds(figures, "filter: body > 0.3 and spacing_z <= 2"):
        taken = select(rows, "body > 0.3 and spacing_z <= 2")
    figures["taken"] = len(taken)
    return figures


def sampler(place: str) -> Figures:
    """Begin to draw crops of a tenth of the patients; their body maps are one and the same, which is not read."""
    figures: Figures = {}
    cells = np.random.default_rng(0).integers(0, 256, (80, 32, 32), dtype=np.uint8)
    maesil.store.reader.load_map = lambda storage, volume, name: cells.copy()  # type: ignore[assignment]
    store = Store.open(place)
    sources = Sources((SuperpatchReader(store),), ("",), stores=(store,))
    groups = sorted(sources.groups)[::10]
    before = most_memory()
    with seconds(figures, "start"):
        made = CropSampler(sources, groups, 64, TrainConfig())
    figures["superpatches"], figures["memory, MB"] = len(made._owner), most_memory() - before
    with seconds(figures, "first epoch ordered"):
        made.draw(0, 0)
    return figures


def duplicates(counts: str) -> Figures:
    """Compare thumbnails of ``OLD+NEW`` different bodies, all of about one size: the new ones with all, and each other.

    Noise is the worst for fingerprints, which look at every pair of such bodies. No pair of them needs more.
    """
    old, new = map(int, counts.split("+"))
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, 80_000_000, dtype=np.uint8)  # 60,000 bodies of their own would take 3 GB

    def body() -> Thumbnail:
        shape = rng.integers((30, 30, 40), (40, 36, 48)).tolist()
        first = int(rng.integers(len(noise) - 80_000))
        return noise[first : first + math.prod(shape)].reshape(shape)

    found = [body() for _ in range(old + new)]
    figures: Figures = {}
    with seconds(figures, "seconds"):
        figures["copies"] = len(list(copies(found, lambda i, j: True, [0] * old + [NEW] * new)))
    return figures


PARTS: dict[str, Callable[[str], Figures]] = {
    one.__name__: one for one in (opened, from_commits, added, tables, sampler, duplicates)
}


def apart(part: str, place: str, environment: dict[str, str] | None = None) -> Figures:
    """Run one part in a process of its own; with the most memory that it held (MB), imports included."""
    command = [sys.executable, __file__, place, "--part", part]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **(environment or {})}
    )
    found: Figures = json.loads(done.stdout)
    return found


def from_a_bucket(store: Store) -> Figures:
    """Open the store from a bucket: plainly, and over a link of 20 ms; with the number of requests."""
    import obstore
    from support.object_server import environment, running_server
    from support.objects import bucket_store

    figures: Figures = {}
    with running_server() as server, server.proxy() as proxy:
        bucket = server.bucket()
        os.environ.update(environment(server.url))
        client = bucket_store(bucket)
        read = "table" if store.version >= TABLE_VERSION else "commits"
        for key in ("zarr.json", f"recipes/{store.recipe_hash}.json", *store.storage.list(read)):
            obstore.put(client, f"store.zarr/{key}", store.storage.read(key), use_multipart=False)
        for latency in (0.0, 0.02):
            proxy.latency, before = latency, len(proxy.requests)
            one = apart("opened", f"s3://{bucket}/store.zarr", environment(proxy.url))
            figures[f"{latency * 1000:.0f} ms"] = {**one, "requests": len(proxy.requests) - before}
    return figures


def measure(folder: Path, volumes: int, superpatches: int) -> Iterator[tuple[str, Any]]:
    """Make the store where it is missing, run all parts, and yield name and figures of each once it is done."""
    path = folder / f"{volumes}.zarr"
    if not path.exists():
        made: Figures = {}
        with seconds(made, "commits written"):
            store = fake_store(path, volumes, superpatches)
        with seconds(made, "table made from all commits"):
            store.keep_table()
        yield "made", made
    store = Store.open(path)
    segments = list(store.storage.list("table/segments"))
    yield "table", {"segments": len(segments), "bytes": sum(map(store.storage.size, segments))}
    yield "opened from disk", apart("opened", str(path))
    yield "opened from a bucket", from_a_bucket(store)
    for count in (43, 2000):
        ordinary = folder / f"{count}.zarr"
        if not ordinary.exists():
            fake_store(ordinary, count, superpatches).keep_table()
        yield f"{count} volumes opened from a bucket", from_a_bucket(Store.open(ordinary))
    yield "one volume added", apart("added", str(path))
    yield "opened from disk after that", apart("opened", str(path))
    yield "tables", apart("tables", str(path))
    yield "sampler", apart("sampler", str(path))
    yield "opened from its commits", apart("from_commits", str(path))
    for counts in ("0+2000", f"{volumes}+1", f"{volumes}+64"):
        yield f"copies among thumbnails, {counts}", apart("duplicates", counts)


def main() -> None:
    """Print the figures, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--volumes", type=int, default=60_000)
    parser.add_argument("--superpatches", type=int, default=17)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--part", choices=PARTS, help="one part alone, of the store FOLDER (duplicates: of OLD+NEW thumbnails)"
    )
    options = parser.parse_args()
    if options.part:
        found = PARTS[options.part](options.folder)
        print(json.dumps({**found, "most memory, MB": most_memory()}))
        return
    figures = {}
    for name, value in measure(Path(options.folder), options.volumes, options.superpatches):
        figures[name] = value
        print(f"{name:32}", ", ".join(f"{key}: {one}" for key, one in value.items()), flush=True)
    if options.json:
        about = {"machine": platform.processor(), "cores": os.cpu_count(), "date": datetime.now(UTC).date().isoformat()}
        options.json.write_text(json.dumps({**about, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
