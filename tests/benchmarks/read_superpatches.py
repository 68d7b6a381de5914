"""Superpatches read, loaded and written by maesil and by others, in one run on the same real CT, with ratios.

    python tests/benchmarks/read_superpatches.py PEERS [--store STORE] [--part PART] [--markdown FILE]

PEERS is the interpreter of an environment that holds the others (never maesil's own: nnunetv2 brings its own torch):

    python -m venv peers
    peers/bin/pip install "torch<2.14" zarr zarrs tensorstore blosc2 numcodecs monai nnunetv2

STORE is a store of superpatches of 128 voxels; without it one is made from the NIfTI files of MAESIL_TEST_DATA. The 64
superpatches with the most body are read. All ways take turns, round by round, so that a drift of the machine's speed
meets them alike; medians over rounds are shown. Whoever has no turn is stopped. The page cache is warm.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from reading_ways import LOADING, OURS, READING, SUPERPATCH_MB, THREADED
from support.stores import add_volume
from writing_ways import EDGE, WRITING

from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import CODECS, Recipe
from maesil.store.store import Store

COUNT, ROUNDS = 64, {"reading": 9, "loading": 5, "writing": 3}
MUST_REACH = [
    ("maesil fast", "memcpy", 0.13),
    ("maesil compact", "memcpy", 0.07),
    ("maesil fast", "zarr-python", 1.7),
    ("maesil fast", "tensorstore", 1.15),
    ("maesil fast", "blosc2", 1.0),
    ("maesil fast, two threads", "maesil fast", 1.7),
    ("maesil, random offsets", "maesil, on the grid", 0.6),
    ("maesil, on the grid", "DataLoader(2) + zarr-python", 5),
    ("maesil, on the grid", "DataLoader(2) + MONAI PersistentDataset", 3.5),
    ("maesil, random offsets", "nnU-Net's own loader, 2 processes", 10),
    ("maesil, random offsets", "DataLoader(2) + nnU-Net crop, no labels", 10),
    ("maesil, random offsets", "DataLoader(2) + MONAI volume + crop", 50),
    ("maesil write", "MONAI write", 10),
    ("maesil write", "nnU-Net write", 10),
]


def prepare(store: Store, work: Path) -> dict[str, Any]:
    """Lay the same voxels out for all ways: a store a codec, raw superpatches, whole volumes, volumes to write."""
    reader = SuperpatchReader(store)
    recipes = {codec: Recipe(spacing=None, superpatch=EDGE, codec=codec) for codec in CODECS}
    stores = {codec: Store.create(work / codec, recipe, "0" * 16) for codec, recipe in recipes.items()}
    patches = [
        (patch.body, volume.volume_id, patch.index) for volume in store.volumes() for patch in volume.superpatches
    ]
    chosen = sorted(patches, reverse=True)[:COUNT]
    data: dict[str, Any] = {"work": str(work), "places": [], "raw": [], "volumes": [], "to_write": []}
    data["stores"] = {codec: str(made.path) for codec, made in stores.items()}
    for volume_id in sorted({volume_id for _, volume_id, _ in chosen}):
        # Whole superpatches: others would return less of those that leave the volume.
        hu = reader.read_region(volume_id, (0, 0, 0), tuple(EDGE * n for n in reader.volumes[volume_id].grid))
        added = {codec: add_volume(made, hu, name=volume_id) for codec, made in stores.items()}
        array = f"{data['stores']['fast']}/{added['fast'].prefix}/0"
        for _, _, index in (entry for entry in chosen if entry[1] == volume_id):
            data["places"].append({"volume": added["fast"].volume_id, "array": array, "index": index})
            data["raw"].append(str(work / f"{len(data['raw'])}.raw"))
            reader.read_superpatch(volume_id, index).tofile(data["raw"][-1])
        data["volumes"].append(
            _save(work / f"{volume_id}.npy", reader.read_region(volume_id, (0, 0, 0), reader.volumes[volume_id].shape))
        )
        if len(data["to_write"]) < 3 and min(hu.shape) > EDGE:
            data["to_write"].append(_save(work / f"{volume_id}_whole.npy", hu))
    return data


def _save(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


class Turns:
    """Processes that are stopped while it is not their turn: worker processes would go on to read ahead."""

    def __init__(self, ways: Iterable[str], peers: str, data: Path, cores: int) -> None:
        self._processes = {}
        for way in ways:
            python, script = sys.executable if way in OURS else peers, Path(__file__).with_name("reading_ways.py")
            command = [python, str(script), way, str(data), str(cores)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            if not any(line == "ready\n" for line in process.stdout or ()):
                sys.exit(f"{way}: did not get ready")
            os.killpg(process.pid, signal.SIGSTOP)
            self._processes[way] = process
            print(f"{way}: ready", file=sys.stderr)

    def take(self, rounds: int) -> dict[str, float]:
        """Return the median MB/s of each way."""
        speeds: dict[str, list[float]] = {way: [] for way in self._processes}
        for _ in range(rounds):
            for way, process in self._processes.items():
                os.killpg(process.pid, signal.SIGCONT)
                process.stdin.write("go\n")
                process.stdin.flush()
                megabytes, seconds = json.loads(process.stdout.readline())
                os.killpg(process.pid, signal.SIGSTOP)
                speeds[way].append(megabytes / seconds)
        for process in self._processes.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return {way: statistics.median(found) for way, found in speeds.items()}


def markdown(speeds: dict[str, float]) -> str:
    """Return the table of speeds, and that of the ratios that were to be reached."""
    lines = ["| way | MB/s | superpatches/s |", "| --- | --- | --- |"]
    lines += [f"| {way} | {speed:,.0f} | {speed / SUPERPATCH_MB:,.1f} |" for way, speed in speeds.items()]
    lines += ["", "| ratio | measured | to reach |", "| --- | --- | --- |"]
    for ours, other, least in MUST_REACH:
        if ours in speeds and other in speeds:
            ratio = speeds[ours] / speeds[other]
            lines.append(f"| {ours} / {other} | {ratio:.2f}{'' if ratio >= least else ' (not reached)'} | {least} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", help="interpreter of the peers' environment")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--part", choices=list(ROUNDS), action="append", help="default: all")
    parser.add_argument("--markdown", type=Path)
    chosen = parser.parse_args()
    parts = chosen.part or list(ROUNDS)
    with tempfile.TemporaryDirectory() as temporary:
        work, speeds = Path(temporary), {}
        data = work / "data.json"
        data.write_text(json.dumps(prepare(Store.open(chosen.store or _ingest_test_data(work)), work)))
        if "reading" in parts:
            turns = Turns(READING, chosen.peers, data, 1)
            speeds |= turns.take(ROUNDS["reading"])
            # One thread against two, both free to use two cores.
            both = Turns(["maesil fast", *THREADED], chosen.peers, data, 2).take(ROUNDS["reading"])
            speeds["maesil fast, two threads"] = (
                both["maesil fast, two threads"] / both["maesil fast"] * speeds["maesil fast"]
            )
        for part, ways in (("loading", LOADING), ("writing", WRITING)):
            if part in parts:
                speeds |= Turns(ways, chosen.peers, data, 2).take(ROUNDS[part])
    table = f"{markdown(speeds)}\n\n{os.cpu_count()} cores, {platform.machine()}, {datetime.date.today().isoformat()}."
    print(table)
    if chosen.markdown:
        chosen.markdown.write_text(table + "\n")


def _ingest_test_data(work: Path) -> Path:
    from maesil.ingest.run import IngestOptions, ingest

    options = IngestOptions(workers=0, key_file=work / "key", cache_folder=work / "cache")
    ingest([Path(os.environ["MAESIL_TEST_DATA"]) / "nifti"], work / "ct", Recipe(superpatch=EDGE), options)
    return work / "ct"


if __name__ == "__main__":
    main()
