"""The hard inputs of the test suite through other readers and through `maesil ingest`, scored in world space.

    python tests/benchmarks/compare_readers.py PYTHON [--markdown FILE]

PYTHON is the interpreter of an environment that holds the peers (never maesil's own):

    python -m venv peers
    peers/bin/pip install highdicom SimpleITK dicom2nifti monai torchio itk torch nibabel
    peers/bin/pip install pylibjpeg pylibjpeg-openjpeg pylibjpeg-rle pyjpegls

Each reader's voxels are compared with the phantom's HU where the reader's own affine says they lie. A case that must be
refused is right only if it is. What lies at -1024 or below is left out, as padding. A reader has warned if it said
something (warning, log, standard error) that it does not say of the clean series too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

# The helpers of the tests, the package, and what lies beside this script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import outside_readers
from peer_readers import NIFTI_AXES, NIFTI_PEERS, PEERS
from support.ct_cases import CASES, Case, everything
from support.ct_phantom import analytic_hu, grid_points, score_world

from maesil.geometry import from_nifti
from maesil.ingest.run import IngestOptions, ingest
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.store import Store

OUTCOMES = ("correct", "refused", "wrong, warned", "wrong, silent", "lost or mixed")
_TRIES = 8
SUITES = {
    "developed against": "DICOM cases it was developed against",
    "outside DICOM": "outside DICOM cases",
    "outside NIfTI": "outside NIfTI cases",
}


def outcome(case: Case, volumes: list[tuple[float, float]], warned: bool) -> str:
    """Judge a reader's volumes, given as (largest, mean) HU error of each."""
    wrong = "wrong, warned" if warned else "wrong, silent"
    if not case.volumes and case.status == "quarantined":
        return wrong if volumes else "correct"
    if not volumes:
        return "correct" if case.refusal_is_right_too or not case.volumes else "refused"
    # Interpolation is ours to allow for: a reader that keeps a sheared grid and says so is exact.
    right = [most <= case.max_error + 0.5 and mean <= case.mean_error + 0.5 for most, mean in volumes]
    if not all(right):
        return wrong
    return "correct" if len(volumes) >= case.volumes else "lost or mixed"


def errors(hu: np.ndarray, affine: np.ndarray, nifti_axes: bool) -> tuple[float, float]:
    """Return largest and mean absolute HU error where the reader says the voxels lie."""
    hu = np.squeeze(np.asarray(hu, np.float64))
    if hu.ndim != 3:
        return np.inf, np.inf
    if nifti_axes:
        hu, affine = hu.transpose(2, 1, 0), from_nifti(affine)
    difference = np.abs(hu - analytic_hu(grid_points(affine, hu.shape)))[hu > -1024]
    return (float(difference.max()), float(difference.mean())) if difference.size else (np.inf, np.inf)


def run_peer(python: str, peer: str, cases: Path, out: Path) -> str:
    """Let a peer read every folder in its own environment; return its version."""
    for _ in range(_TRIES):  # a crash costs one case: the next try goes on behind it
        command = [python, str(Path(__file__).with_name("peer_readers.py")), peer, str(cases), str(out)]
        if subprocess.run(command, capture_output=True).returncode == 0:
            break
    return (out / "version.txt").read_text()


def volumes_of(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return what a peer read of a case. A single image is no volume; that it was given besides does no harm."""
    if not path.exists():
        return []
    with np.load(path) as arrays:
        count = sum(key.startswith("hu") for key in arrays)
        pairs = [(arrays[f"hu{n}"], arrays[f"affine{n}"]) for n in range(count)]
    return [(hu, affine) for hu, affine in pairs if min(np.shape(hu)[-3:], default=0) > 1]


def of_peer(python: str, peer: str, cases: Path, out: Path) -> tuple[str, dict[str, str]]:
    """Return the version and the outcome of each case for one peer."""
    version, found = run_peer(python, peer, cases, out), {}
    always = _said(out / "clean.npz")
    for name, case in CASES.items():
        path = out / f"{name}.npz"
        volumes = [errors(hu, affine, peer in NIFTI_AXES) for hu, affine in volumes_of(path)]
        found[name] = outcome(case, volumes, warned=bool(_said(path) - always))
    return version, found


def outside(python: str, kind: str, work: Path) -> dict[str, dict[str, str]]:
    """Return the outcome of each outside case of a kind for `maesil ingest` and each peer."""
    written = outside_readers.write_cases(work / "cases", kind)
    results = {"maesil ingest": outside_readers.of_maesil(work / "cases", work / "maesil", written)}
    for peer in PEERS if kind == "dicom" else NIFTI_PEERS:
        print(f"{peer}...", file=sys.stderr)
        out = work / peer.replace(" ", "_")
        version = run_peer(python, peer, work / "cases", out)
        always = _said(out / f"{outside_readers.CLEAN[kind]}.npz")
        found = results[f"{peer} {version}"] = {}
        for name, expected in written.items():
            path = out / f"{name}.npz"
            warned = bool(_said(path) - always)
            found[name] = outside_readers.outcome(expected, volumes_of(path), warned, peer in NIFTI_AXES)
    return results


def _said(path: Path) -> set[str]:
    """Return the kinds of warnings given with a result."""
    if not path.exists():
        return set()
    with np.load(path) as arrays:
        return set(arrays["said"].tolist())


def of_maesil(cases: Path, work: Path) -> dict[str, str]:
    """Return the outcome of each case for `maesil ingest`: one run over all."""
    options = IngestOptions(workers=0, key_file=work / "key", cache_folder=work / "cache")
    summary = ingest([cases], work / "store.zarr", Recipe(spacing=None, superpatch=64), options)
    store = Store.open(work / "store.zarr")
    reader, found = SuperpatchReader(store), {}
    for name, case in CASES.items():
        used = [v for v in summary.files if v.path.is_relative_to(cases / name) and v.status == "used"]
        ids = {volume_id for verdict in used for volume_id in (verdict.volume_id, *verdict.more_volumes)}
        scores = [score_world(store, volume_id, reader=reader) for volume_id in sorted(ids)]
        found[name] = outcome(case, [(score.max_error, score.mean_error) for score in scores], warned=False)
    return found


def markdown(results: dict[str, dict[str, str]], title: str) -> str:
    """Return the table of totals, and what each reader got wrong."""
    count = len(next(iter(results.values())))
    lines = [f"| reader ({count} {title}) | {' | '.join(OUTCOMES)} |", "|---|---|---|---|---|---|"]
    for name, found in results.items():
        counted = Counter(found.values())
        lines.append(f"| {name} | {' | '.join(str(counted[kind]) for kind in OUTCOMES)} |")
    lines.append("")
    for name, found in results.items():
        for kind in ("wrong, silent", "lost or mixed"):
            cases = [case for case, said in found.items() if said == kind]
            lines += [f"* {name}, {kind}: {', '.join(cases)}"] * bool(cases)
    return "\n".join(lines)


def developed_against(python: str, work: Path) -> dict[str, dict[str, str]]:
    """Return the outcome of each of the suite's own DICOM cases for `maesil ingest` and each peer."""
    for name in everything():
        CASES[name].build(work / "cases" / name, f"PATIENT-{name}")
    results = {"maesil ingest": of_maesil(work / "cases", work)}
    for peer in PEERS:
        print(f"{peer}...", file=sys.stderr)
        version, found = of_peer(python, peer, work / "cases", work / peer.replace(" ", "_"))
        results[f"{peer} {version}"] = found
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="interpreter of the peers' environment")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--suite", choices=SUITES, action="append", help="default: all")
    chosen = parser.parse_args()
    results, tables = {}, []
    for suite in chosen.suite or SUITES:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            results[suite] = (
                developed_against(chosen.python, work)
                if suite == "developed against"
                else outside(chosen.python, suite.split()[-1].lower(), work)
            )
        tables.append(markdown(results[suite], SUITES[suite]))
        print(tables[-1], flush=True)
    if chosen.markdown:
        text = "\n\n".join(tables)
        chosen.markdown.write_text(f"{text}\n\nObtained {datetime.date.today().isoformat()}.\n")
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
