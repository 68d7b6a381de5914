"""What the size of a volume and the direction of its slices say of it. The rules are ours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maesil.errors import Refused
from maesil.geometry import spacing_of
from maesil.ingest.scanned import Scanned

_FIELD_MM = (50.0, 1000.0)
"""No scan of a person is narrower, and none is wider, along two axes at once."""
_COARSER = 1.1
_PLANES = ("sagittal", "coronal")


def size_doubts(scan: Scanned) -> Iterator[Refused]:
    """Yield why a NIfTI's lengths cannot be millimetres: its unit has no code for cm, and writers leave it out.

    DICOM defines its lengths to be in mm (PS3.3 10.7.1.3).
    """
    if scan.source.get("kind") != "nifti":
        return
    extent = [n * mm for n, mm in zip(scan.shape, spacing_of(scan.affine), strict=True)]
    least, most = _FIELD_MM
    if sum(mm < least for mm in extent) < 2 and sum(mm > most for mm in extent) < 2:
        return
    size = " x ".join(f"{mm:.3g}" for mm in reversed(extent))
    text = f"expected a field of {least:.0f} to {most:.0f} mm in the plane, found {size} mm (i j k)"
    advice = "lengths are perhaps in cm, m or voxels; write sform, qform and pixdim in mm"
    yield Refused("implausible_size", f"{text}: {advice}", extent_mm=[float(mm) for mm in extent])


def plane_note(scan: Scanned) -> list[str]:
    """Return a note where slices are sagittal or coronal, as scanners hardly make them: likely a reformat.

    The slices of DICOM are known. Those of NIfTI lie along the axis of the largest step, if there is one.
    """
    axis = 0
    if scan.source.get("kind") == "nifti":
        order = np.argsort(spacing_of(scan.affine))
        axis = int(order[2])
        if spacing_of(scan.affine)[axis] < _COARSER * spacing_of(scan.affine)[int(order[1])]:
            return []
    towards = int(np.abs(scan.affine[:3, axis]).argmax())
    return [f"{_PLANES[towards]}_slices"] if towards < len(_PLANES) else []
