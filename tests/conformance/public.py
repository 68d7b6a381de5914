"""Small inputs made after public bug reports, each with an EXPECT.json, and what is wrong with what becomes of them.

The archive comes from the folder that `MAESIL_TEST_DATA` names.
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conformance.judge import AIR_STORED, Exported, exported, run_command
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

ARCHIVE = Path(os.environ.get("MAESIL_TEST_DATA", "no such folder")) / "public_cases.tar.gz"
_NEVER = {"unexpected", "worker_lost", "out_of_memory", "decoder_killed"}
_LOSSY_HU = 3.5
_ROUNDED_HU = 0.51
_RESAMPLED_HU = 25.0
_SCORED, _SCORED_RESAMPLED = 0.99, 0.3


@dataclass(frozen=True)
class Case:
    """One input and what it must become."""

    source: Path
    expected: dict[str, Any]

    @property
    def allowed(self) -> set[str]:
        """Any of ``ok``, ``refused`` and ``split N``."""
        return set(self.expected["outcome"].split("|"))

    @property
    def references(self) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """HU [z, y, x] and affine to LPS of each volume that must be found."""
        folder = self.source.parent
        return [(np.load(folder / hu["npy"]).astype(float), np.array(hu["affine_lps"])) for hu in self.expected["hu"]]


def names() -> list[str]:
    """Return the cases of the archive; none where it is not there."""
    if not ARCHIVE.is_file():
        return []
    with tarfile.open(ARCHIVE) as archive:
        parts = [Path(name).parts for name in archive.getnames() if name.endswith("/EXPECT.json")]
    return sorted(part[-2] for part in parts)


def unpack(folder: Path) -> dict[str, Case]:
    """Unpack the archive and return its cases by name."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="fully_trusted")  # a case may hold links that lead out of it
    found = {}
    for path in folder.rglob("EXPECT.json"):
        found[path.parent.name] = Case(path.parent / "src", json.loads(path.read_text()))
    return found


def faults(case: Case, work: Path) -> list[str]:
    """Ingest a case through the command line; return what is wrong with the result, a line each."""
    store = work / "store.zarr"
    arguments = ["ingest", str(case.source), "--out", str(store), "--spacing", "native", "--superpatch", "64"]
    arguments += ["--workers", "0", "--key-file", str(work / "key"), "--json", *case.expected.get("options", [])]
    code, printed, said = run_command(arguments)
    if code == 3 and not printed:
        return [] if "refused" in case.allowed else [f"nothing usable was found: {said}"]
    summary = json.loads(printed)
    volumes = exported(store, work)
    codes = {file["code"] for file in summary["files"]}
    wrong = [f"crash: {codes & _NEVER}"] if codes & _NEVER else []
    wrong += [f"exit code {code} without a refusal"] if code not in (0, 1, 3) else []
    wrong += ["nothing was refused, exit code 0"] if not volumes and code == 0 else []
    wrong += [f"exit code {code}"] if case.allowed == {"ok"} and code != 0 else []
    return wrong + _wrong_volumes(case, volumes)


def _wrong_volumes(case: Case, volumes: list[Exported]) -> list[str]:
    if not volumes:
        return [] if "refused" in case.allowed else ["no volume"]
    if case.allowed == {"refused"}:
        return ["a volume was made of it"]
    if not case.references:
        return [] if all(volume.notes for volume in volumes) else ["taken without a note"]
    counts = {int(word.split()[1]) for word in case.allowed if word.startswith("split")}
    if counts and len(volumes) not in counts:
        return [f"{len(volumes)} volumes, not {counts}"]
    wrong = []
    for number, (hu, affine) in enumerate(case.references):
        found = [_fault(volume, hu, affine) for volume in volumes]
        if all(found):
            wrong.append(f"volume {number} was not found: {min(map(str, found), key=len)}")
    return wrong


def _fault(volume: Exported, hu: NDArray[np.float64], affine: NDArray[np.float64]) -> str | None:
    """Return how a volume differs from a reference, looked up where both affines say its voxels lie."""
    index = np.stack(np.meshgrid(*map(np.arange, hu.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    at = (world - volume.affine[:3, 3]) @ np.linalg.inv(volume.affine[:3, :3]).T
    last = np.array(volume.voxels.shape) - 1
    inside = ((at >= -1e-3) & (at <= last + 1e-3)).all(axis=1)
    at = np.clip(at, 0, last)
    known = inside & _whole_cells(volume)[tuple(np.rint(at).astype(int).T // 8)]
    whole = np.abs(at - np.rint(at)).max() < 0.1
    if known.mean() < (_SCORED if whole else _SCORED_RESAMPLED):
        return f"{known.mean():.0%} of its voxels are valid"
    stored = map_coordinates(volume.voxels.astype(float), at[known].T, order=0 if whole else 1)
    error = np.abs(stored - np.clip(hu.reshape(-1)[known], AIR_STORED, 3071))
    if not whole:
        return f"median error {np.median(error):.1f} HU" if np.median(error) > _RESAMPLED_HU else None
    allowed = _LOSSY_HU if "lossy" in volume.notes else _ROUNDED_HU
    return f"error of {error.max():.1f} HU" if error.max() > allowed else None


def _whole_cells(volume: Exported) -> NDArray[np.bool_]:
    """Return which cells are valid as far as they lie within the volume."""
    parts = [
        np.minimum(8, n - 8 * np.arange(cells)) / 8
        for n, cells in zip(volume.voxels.shape, volume.valid.shape, strict=True)
    ]
    return volume.valid >= np.rint(255 * np.einsum("i,j,k->ijk", *parts)) - 0.5
