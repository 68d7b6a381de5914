"""A small tree of real CT sources, and what may be asked of the store made from it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from support.ct_phantom import SHAPE, base_affine, sample

from maesil.ingest.run import IngestOptions, ingest
from maesil.ingest.summary import Summary
from maesil.store.nifti import write_nifti
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series

NATIVE = Recipe(spacing=None, superpatch=32)
PATIENTS = ("DOE-JANE-4711", "ROE-RICHARD-0815")
SLICES = SHAPE[0]
FILES = 2 * SLICES + 2
"""Two series, two NIfTI files."""


@dataclass(frozen=True)
class Workplace:
    """A folder with sources, a store, a key and a memory of its own."""

    root: Path

    @property
    def sources(self) -> Path:
        return self.root / "sources"

    @property
    def out(self) -> Path:
        return self.root / "store.zarr"

    @property
    def key(self) -> Path:
        return self.root / "identity.key"

    def options(self, **more) -> IngestOptions:
        return IngestOptions(**{"workers": 0, "key_file": self.key, "cache_folder": self.root / "cache"} | more)

    def ingest(self, *sources: Path, recipe: Recipe = NATIVE, progress=lambda *_: None, **more) -> Summary:
        return ingest(list(sources) or [self.sources], self.out, recipe, self.options(**more), progress)

    def start_until(self, written: str, workers: int, **options) -> subprocess.Popen:
        """Start the command; return once the store holds files of this pattern, or it ended, or after two minutes."""
        command = [sys.executable, "-m", "maesil", "ingest", str(self.sources), "--out", str(self.out)]
        command += ["--spacing", "native", "--superpatch", "32", "--key-file", str(self.key), "--workers", str(workers)]
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.root / "cache")}
        process = subprocess.Popen(command, env=environment, **options)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not list(self.out.glob(written)):
            time.sleep(0.002)
        return process

    @property
    def store(self) -> Store:
        return Store.open(self.out)

    def copy(self, root: Path) -> Workplace:
        """The same key and sources (their times kept), elsewhere and without a store."""
        root.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.sources, root / "sources")
        shutil.copy2(self.key, root / "identity.key")
        return Workplace(root)

    def copy_all(self, root: Path) -> Workplace:
        """The store too."""
        copy = self.copy(root)
        shutil.copytree(self.out, copy.out, symlinks=True)
        return copy


def phantom_hu(level: float = 0.0) -> np.ndarray:
    """HU ``[z, y, x]`` of the phantom on its own grid, soft parts raised by ``level``."""
    hu = np.rint(sample(base_affine()))
    return np.where((hu > -300) & (hu < 300), hu + level, hu)


def write_sources(folder: Path) -> None:
    """Two series of two patients in one folder, shuffled names, a NIfTI file, and a file that is no CT: 50 files."""
    for number, patient in enumerate(PATIENTS):
        who = SeriesIdentity(patient=patient, study=f"study of {patient}", description=f"description of {patient}")
        write_dicom_series(folder / "export", phantom_hu(7.0 * number), base_affine(), who, seed=number)
    write_nifti(folder / "nifti of SMITH" / "SMITH-42.nii.gz", phantom_hu(20.0).astype(np.int16), base_affine())
    (folder / "notes about SMITH.txt").write_text("SMITH-42 came late")


def slices_of(folder: Path, patient: str) -> list[Path]:
    """The files of one patient, from the feet up."""
    found = []
    for path in sorted(folder.rglob("*.dcm")):
        data = pydicom.dcmread(path, stop_before_pixels=True)
        if data.PatientID == patient:
            found.append((float(data.ImagePositionPatient[2]), path))
    return [path for _, path in sorted(found)]


def edit_pixel(path: Path, by: int = 5) -> None:
    """Change one pixel in the middle of a slice."""
    data = pydicom.dcmread(path)
    pixels = data.pixel_array.copy()
    pixels[pixels.shape[0] // 2, pixels.shape[1] // 2] += by
    data.PixelData = pixels.tobytes()
    data.save_as(path)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): ((s := p.stat()).st_ino, s.st_size, s.st_mtime_ns) for p in files}


def contents(store: Store) -> dict[str, tuple]:
    """What each live commit says, without what may differ between two runs (attempt and generation)."""
    return {
        v.volume_id: (
            v.group, v.source_hash, v.recipe_hash, v.shape, v.affine_lps, v.hu, v.notes, v.source,
            tuple((p.index, p.offset, p.length, p.crc32c, p.valid, p.body, p.air) for p in v.superpatches),
        )
        for v in store.volumes()
    }  # fmt: skip


def attempts(store: Store) -> list[str]:
    """All attempts on disk, ``volume_id/attempt``."""
    return sorted(f"{p.parent.name}/{p.name}" for p in (store.path / "volumes").glob("??/*/*") if p.is_dir())


def incomplete(place: Workplace) -> Path:
    """Take a slice out of the middle of the first patient; return it for putting back."""
    path = slices_of(place.sources, PATIENTS[0])[9]
    hidden = place.root / "hidden.dcm"
    path.rename(hidden)
    hidden.with_suffix(".where").write_text(str(path))
    return hidden


_DRAWN = re.compile(rb"(?<![0-9a-f])(?=[0-9]*[a-f])(?:[0-9a-f]{16}|[0-9a-f]{32}|[0-9a-f]{64})(?![0-9a-f])")
"""Keyed hashes and names of attempts: drawn anew with every key and run, they hold any four digits now and then."""


def assert_anonymous(place: Workplace, words: list[str]) -> None:
    """No word stands in any byte of the store, nor in what its compressed tables decode to."""
    import pyarrow.parquet as pq

    for path in place.out.rglob("*"):
        data = str(path.relative_to(place.out)).encode() + b"\n"
        if path.is_file():
            data += path.read_bytes()
            if path.suffix == ".parquet":
                data += str(pq.read_table(path).to_pylist()).encode()
        data = _DRAWN.sub(b"", data)
        found = [word for word in words if word.encode() in data or word.encode("utf-16-le") in data]
        assert not found, (path, found)
