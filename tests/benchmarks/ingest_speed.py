"""Ingest of one series on one core, beside its floors: read, decode, resample, compress, each by a library alone.

    python tests/benchmarks/ingest_speed.py FOLDER [--spacing 1.5] [--rounds 5] [--peers PYTHON] [--json FILE]

FOLDER holds one single-frame series. Start-up (imports, the child that decodes, an empty store) is paid before the
clock runs. The floor of resampling is SimpleITK's linear filter; with the Gaussian that downsampling needs it is
shown apart.
Besides, it measures how many headers a second the scan reads. Rounds go through all ways in turn; medians are shown.

PYTHON is the interpreter of an environment with the peers (`pip install torch nnunetv2 monai pydicom nibabel`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
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
from maesil.ingest.privacy import load_or_create_key
from maesil.ingest.run import IngestOptions, ingest
from maesil.ingest.scan import scan
from maesil.store.nifti import export_volume
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe, parse_spacing
from maesil.store.store import Store

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

    def resample_smoothed(self) -> None:
        """The same after a Gaussian along each axis that is downsampled."""
        if self.spacing is not None:
            factors = np.array(self.spacing) / np.linalg.norm(self.item.source.affine[:3, :3], axis=0)
            variance = np.where(factors > 1, 0.25 * (factors**2 - 1), 0)[::-1]
            sitk.DiscreteGaussian(sitk.GetImageFromArray(self.stack), variance.tolist(), 32, 1e-3, False)
        self.resample()

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
    recipe, key = Recipe(spacing=parse_spacing(spacing), superpatch=TILE), load_or_create_key(work / "key")
    numbers = iter(range(rounds + 1))
    for number in range(rounds + 1):
        Store.create(work / f"store{number}.zarr", recipe, key.fingerprint)

    def ours() -> None:
        number = next(numbers)
        options = IngestOptions(workers=0, key_file=work / "key", cache_folder=work / f"cache{number}")
        assert len(ingest([folder], work / f"store{number}.zarr", recipe, options).committed) == 1

    ways: dict[str, Callable[[], object]] = {
        "read + decode": floors.read_and_decode,
        "resample": floors.resample,
        "resample, smoothed": floors.resample_smoothed,
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
    found["floors, smoothed"] = found["floors"] - found["resample"] + found["resample, smoothed"]
    for name in ("floors", "floors, smoothed"):
        found[f"ingest / {name}"] = found["maesil ingest"] / found[name]
    found["headers a second"] = len(floors.paths) / found["maesil scan"]
    return found


def measure_peers(python: Path, folder: Path, spacing: str, work: Path) -> dict[str, float]:
    """Return the median seconds of MONAI and of nnU-Net, which is given our NIfTI of the series."""
    recipe = Recipe(spacing=None, superpatch=TILE)
    ingest([folder], work / "native.zarr", recipe, IngestOptions(workers=0, key_file=work / "key"))
    store = Store.open(work / "native.zarr")
    nifti = export_volume(SuperpatchReader(store), store.volumes()[0].volume_id, work)
    seconds = {}
    for peer, source in (("monai", folder), ("nnunet", nifti)):
        script = Path(__file__).with_name("peer_preprocessing.py")
        command = [str(python), str(script), peer, str(source), spacing, str(work / peer)]
        (work / peer).mkdir()
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        seconds[peer] = statistics.median(json.loads(ended.stdout.splitlines()[-1]))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--spacing", default="1.5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as work:
        found = measure(chosen.folder, chosen.spacing, chosen.rounds, Path(work))
        peers = measure_peers(chosen.peers, chosen.folder, chosen.spacing, Path(work)) if chosen.peers else {}
    for name, seconds in peers.items():
        found |= {name: seconds, f"{name} / maesil": seconds / found["maesil ingest"]}
    for name, value in found.items():
        print(f"{name:32} {value:10.3f}")
    if chosen.json:
        about = {"machine": platform.platform(), "cores": os.cpu_count(), "date": datetime.date.today().isoformat()}
        chosen.json.write_text(json.dumps({**about, **found}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
