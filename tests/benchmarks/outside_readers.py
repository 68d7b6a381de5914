"""The outside cases of the test suite (`conformance.cases`) through other readers, for `compare_readers.py`.

A reader is right if each of its volumes is one of the scans that are expected, all of them are there, and nothing is
there where a refusal is. Cases that need an option of ours, and those of archives, links and bombs, are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conformance import bombs, containers
from conformance.cases import CASES
from conformance.judge import Expected, fault_of_reader, judge

from maesil.geometry import from_nifti

Written = dict[str, Expected]
Read = Callable[[str], list[tuple[np.ndarray, np.ndarray]]]
CLEAN = {"dicom": "descending", "nifti": "nifti_int16_slope_nan_inter_nan"}
"""What a reader says of these, it says of everything."""


def write_cases(root: Path, kind: str) -> Written:
    """Write the cases of one kind (dicom or nifti), a folder each; return what each must become."""
    written = {}
    for name, write in CASES.items():
        left_out = write.__module__ in (containers.__name__, bombs.__name__)
        if left_out or name.startswith("nifti_") != (kind == "nifti"):
            continue
        (root / name).mkdir(parents=True)
        expected = write(root / name)
        if not expected.options:
            written[name] = expected
    return written


def outcome(expected: Expected, volumes: list[tuple[Any, Any]], warned: bool, nifti_axes: bool) -> str:
    """Judge the volumes of a reader."""
    if not volumes:
        return "correct" if expected.or_refused or not expected.scans else "refused"
    left = list(expected.scans)
    for hu, affine in volumes:
        voxels, lps = np.squeeze(np.asarray(hu)), np.asarray(affine, np.float64)
        if nifti_axes and voxels.ndim == 3:
            voxels, lps = voxels.transpose(2, 1, 0), from_nifti(lps)
        match = next((scan for scan in left if _is(voxels, lps, scan)), None)
        if match is None:
            return "wrong, warned" if warned else "wrong, silent"
        left.remove(match)
    return "lost or mixed" if left else "correct"


def _is(voxels: np.ndarray, affine: np.ndarray, scan: Any) -> bool:
    """Interpolation is ours to allow for: a reader that keeps a sheared grid and says so is exact."""
    if voxels.ndim != 3 or voxels.dtype.kind not in "iuf":
        return False
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        return False
    with np.errstate(all="ignore"):
        return fault_of_reader(voxels.astype(np.float64), affine, scan.but(tolerance=scan.tolerance + 0.5)) is None


def of_maesil(cases: Path, work: Path, written: Written) -> dict[str, str]:
    """Return the outcome of each case for `maesil ingest`; what its own judge finds wrong is never called warned."""
    found = {}
    for name, expected in written.items():
        (work / name).mkdir(parents=True)
        wrong = judge(cases / name, work / name, expected)
        refused = any(line.startswith("refused although") for line in wrong)
        found[name] = "correct" if not wrong else "refused" if refused else "wrong, silent"
    return found
