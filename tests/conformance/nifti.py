"""How outside cases of NIfTI are written: whole images, and changes to the bytes of their headers."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from conformance.case import CASES, SCAN, Case
from conformance.judge import Expected
from conformance.phantom import Scan
from numpy.typing import NDArray


def case(function: Case) -> Case:
    CASES[f"nifti_{function.__name__}"] = function
    return function


def ras(scan: Scan) -> NDArray[np.float64]:
    """Return the NIfTI affine (i j k to RAS mm) of a scan."""
    affine = np.diag([-1.0, -1, 1, 1]) @ scan.affine
    affine[:, :3] = affine[:, 2::-1]
    return affine


def image(
    scan: Scan = SCAN,
    data: NDArray[Any] | None = None,
    sform: int = 1,
    qform: int = 1,
    kind: type = nibabel.Nifti1Image,
    dtype: Any = np.int16,
    slope: float = float("nan"),
    inter: float = float("nan"),
) -> Any:
    """Return an image of the scan; ``data`` (i j k) replaces its HU."""
    values = scan.values().transpose(2, 1, 0) if data is None else data
    made = kind(values.astype(dtype), ras(scan), dtype=np.dtype(dtype))
    made.set_sform(ras(scan), sform)
    made.set_qform(ras(scan), qform)
    made.header.set_xyzt_units("mm")
    made.header["scl_slope"], made.header["scl_inter"] = slope, inter
    made.header["descrip"] = b"Roe^Ada 1944"
    return made


def save(made: Any, path: Path, change: Callable[[bytearray], bytes | bytearray | None] | None = None) -> Path:
    """Write raw image bytes (to_bytes never rescales), gzipped where the name says so; ``change`` may bend them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = made.header.copy()
    endian = header.endianness
    data = np.asanyarray(made.dataobj)
    header["vox_offset"] = 0
    raw = bytearray(type(made)(data, made.affine, header).to_bytes())
    size = header.sizeof_hdr
    slots = {348: (112, "f"), 540: (176, "d")}[size]
    struct.pack_into(
        f"{endian}2{slots[1]}", raw, slots[0], float(made.header["scl_slope"]), float(made.header["scl_inter"])
    )
    raw = change(raw) or raw if change else raw
    path.write_bytes(gzip.compress(bytes(raw), 1, mtime=0) if path.suffix == ".gz" else bytes(raw))
    return path


def simple(
    name: str,
    make: Callable[[], Any],
    expected: Expected,
    change: Callable[[bytearray], bytes | bytearray | None] | None = None,
    file: str = "ct.nii",
) -> None:
    def write_case(folder: Path) -> Expected:
        save(make(), folder / file, change)
        return expected

    CASES[f"nifti_{name}"] = write_case


HU = SCAN.values().transpose(2, 1, 0)
