"""Ingest of one series on one core, beside its floors: read, decode, resample, compress, each by a library alone.

    python tests/benchmarks/ingest_speed.py FOLDER [--spacing 1.5] [--rounds 5] [--json FILE]

FOLDER holds one single-frame series. Start-up (imports, the child that decodes) is paid before the clock runs. Besides,
it measures how many headers a second the scan reads. Rounds go through all ways in turn; medians are shown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from numcodecs import blosc

from maesil.geometry import orthogonal_grid
from maesil.ingest.isolated import read
from maesil.ingest.plan import make_plan
from maesil.ingest.run import IngestOptions, ingest
from maesil.ingest.scan import scan
from maesil.recipe import Recipe, parse_spacing

TILE = 128


class Floors:
    """The least that must be done for one series."""

    def __init__(self, folder: Path, spacing: str) -> None:
        (self.item,) = make_plan(scan([folder])).volumes
        self.paths = self.item.source.paths
        self.spacing = parse_spacing(spacing)
        self.stack = self.read_and_decode()
        self.resampled = self.resample()

    def read_and_decode(self) -> np.ndarray:
        """HU by pydicom."""
        slices = []
        for path in self.paths:
            data = pydicom.dcmread(path)
            slices.append(data.pixel_array * np.float32(data.RescaleSlope) + np.float32(data.RescaleIntercept))
        return np.stack(slices)

    def resample(self) -> np.ndarray:
        """Linear, by SimpleITK, without a prefilter."""
        if self.spacing is None:
            return self.stack.astype(np.int16)
        affine = self.item.source.affine
        shape, _ = orthogonal_grid(self.stack.shape, affine, self.spacing)
        step = [mm / own for mm, own in zip(self.spacing, np.linalg.norm(affine[:3, :3], axis=0), strict=True)]
        image = sitk.GetImageFromArray(self.stack)
        out = sitk.Resample(
            image, [int(n) for n in shape[::-1]], sitk.Transform(), sitk.sitkLinear, [0.0] * 3, step[::-1],
            np.eye(3).ravel().tolist(), -1024.0, sitk.sitkFloat32,
        )  # fmt: skip
        return sitk.GetArrayFromImage(out).astype(np.int16)

    def compress(self) -> int:
        """blosc lz4 of whole tiles, written to a file."""
        codec = blosc.Blosc(cname="lz4", clevel=5, shuffle=blosc.SHUFFLE)
        padded = np.pad(self.resampled, [(0, -n % TILE) for n in self.resampled.shape], constant_values=-1024)
        size = 0
        with tempfile.TemporaryFile() as file:
            for z in range(0, padded.shape[0], TILE):
                for y in range(0, padded.shape[1], TILE):
                    for x in range(0, padded.shape[2], TILE):
                        tile = np.ascontiguousarray(padded[z : z + TILE, y : y + TILE, x : x + TILE])
                        size += file.write(codec.encode(tile))
            file.flush()
            os.fsync(file.fileno())
        return size


def measure(folder: Path, spacing: str, rounds: int, work: Path) -> dict[str, float]:
    """Return median seconds of each way, and headers a second."""
    blosc.use_threads = False
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    floors = Floors(folder, spacing)
    recipe, number = Recipe(spacing=parse_spacing(spacing), superpatch=TILE), 0

    def ours() -> None:
        nonlocal number
        number += 1
        options = IngestOptions(workers=0, key_file=work / "key", cache_folder=work / f"cache{number}")
        assert len(ingest([folder], work / f"store{number}.zarr", recipe, options).committed) == 1

    ways: dict[str, Callable[[], object]] = {
        "read + decode": floors.read_and_decode,
        "resample": floors.resample,
        "compress": floors.compress,
        "maesil scan": lambda: scan([folder]),
        "maesil decode (in the child)": lambda: read(floors.item.source),
        "maesil ingest": ours,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - started)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    found["floors"] = found["read + decode"] + found["resample"] + found["compress"]
    found["ingest / floors"] = found["maesil ingest"] / found["floors"]
    found["headers a second"] = len(floors.paths) / found["maesil scan"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--spacing", default="1.5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as work:
        found = measure(chosen.folder, chosen.spacing, chosen.rounds, Path(work))
    for name, value in found.items():
        print(f"{name:32} {value:10.3f}")
    if chosen.json:
        about = {"machine": platform.platform(), "cores": os.cpu_count(), "date": datetime.date.today().isoformat()}
        chosen.json.write_text(json.dumps({**about, **found}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
