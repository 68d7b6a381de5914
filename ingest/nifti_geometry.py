"""Where the voxels of a NIfTI lie: the affine of its sform or qform, in mm LPS.

After the NIfTI-1 and NIfTI-2 standards (fields ``sform_code``, ``qform_code``, ``quatern_b`` and so on, ``pixdim``,
``xyzt_units``) and their reference code, ``nifti1_io.c``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.geometry import Affine, from_nifti
from maesil.ingest.limits import MAX_SPACING_MM, MIN_SPACING_MM

_MAX_FORM_DIFFERENCE_MM = 1.0
_MAX_SIZE_DIFFERENCE = 0.02
_MAX_TOO_LONG = 0.01
"""By so much may rounding make a quaternion longer than 1."""
_NOTED_TOO_LONG = 1e-6
_NO_ANGLE = 1e-7
_MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}

Matrix = NDArray[np.float64]


def affine_of(header: Any, notes: set[str], prefer: str = "") -> Affine:
    """Return the affine of a nibabel header, voxel index ``[z, y, x, 1]`` to mm LPS; `Refused` if it is not known.

    ``prefer`` (``sform`` or ``qform``) decides where the two differ. What was noticed is added to ``notes``.
    """
    sform, qform = _sform(header), _qform(header, notes)
    if isinstance(sform, str) and isinstance(qform, str):
        raise Refused("no_orientation", f"expected an sform or a qform, found neither: {sform}; {qform}")
    if isinstance(sform, str):
        if header["sform_code"]:
            notes.add("singular_sform_ignored")
        chosen = qform
    elif isinstance(qform, str):
        _compare_sizes(sform, header, notes, prefer)
        chosen = sform
    else:
        chosen = _preferred(sform, qform, header.get_data_shape(), notes, prefer)
    assert not isinstance(chosen, str)
    if np.array_equal(chosen, np.eye(4)):
        notes.add("identity_affine")
    return _in_millimetres(from_nifti(chosen), header, notes)


def _sform(header: Any) -> Matrix | str:
    """Return the sform, or why there is none."""
    if not header["sform_code"]:
        return "sform_code is 0"
    rows = [np.asarray(header[name], dtype=np.float64) for name in ("srow_x", "srow_y", "srow_z")]
    sform = np.vstack([*rows, [0, 0, 0, 1]])
    return sform if _usable(sform) else "the sform is singular or not finite"


def _qform(header: Any, notes: set[str]) -> Matrix | str:
    """Return the qform, or why there is none."""
    if not header["qform_code"]:
        return "qform_code is 0"
    sizes = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    bcd = np.array([float(header[f"quatern_{name}"]) for name in "bcd"])
    length = float(np.linalg.norm(bcd))
    if not length <= 1 + _MAX_TOO_LONG:
        return f"the qform's quaternion is no rotation (b, c, d have length {length:.4g}, at most 1 was expected)"
    if length > 1 + _NOTED_TOO_LONG:
        notes.add("quaternion_normalised")
    qform = np.eye(4)
    qform[:3, :3] = rotation_of(bcd) * sizes * (1, 1, -1 if header["pixdim"][0] < 0 else 1)
    qform[:3, 3] = [float(header[f"qoffset_{name}"]) for name in "xyz"]
    found = "the qform is singular or not finite"
    return qform if (sizes > 0).all() and _usable(qform) else f"{found} (pixdim {sizes.tolist()})"


def rotation_of(bcd: Matrix) -> Matrix:
    """Return the rotation of a unit quaternion whose first part is left out, as ``nifti_quatern_to_mat44`` does.

    Parts that rounding made longer than 1 are taken for a turn by 180 degrees.
    """
    rest = 1 - float(bcd @ bcd)
    if rest < _NO_ANGLE:
        a, (b, c, d) = 0.0, bcd / np.linalg.norm(bcd)
    else:
        a, (b, c, d) = rest**0.5, bcd
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )


def _preferred(sform: Matrix, qform: Matrix, shape: tuple[int, ...], notes: set[str], prefer: str) -> Matrix:
    """Return the one that counts: where both put the volume at the same place, the sform."""
    corners = np.array([[i, j, k, 1] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)])
    apart = float(np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max())
    if apart <= _MAX_FORM_DIFFERENCE_MM:
        return sform
    if prefer not in ("sform", "qform"):
        text = f"sform and qform place the volume {apart:.1f} mm apart; --prefer sform or --prefer qform decides"
        raise Refused("forms_differ", text, apart_mm=apart)
    notes.add(f"{prefer}_preferred")
    return qform if prefer == "qform" else sform


def _compare_sizes(sform: Matrix, header: Any, notes: set[str], prefer: str) -> None:
    """Raise `Refused` where pixdim contradicts the voxels of an sform that stands alone; its default says nothing.

    Of a sheared sform pixdim may hold the edges of a voxel, or the distances of its faces.
    """
    sizes = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        return
    edges = np.linalg.norm(sform[:3, :3], axis=0)
    faces = 1 / np.linalg.norm(np.linalg.inv(sform[:3, :3]), axis=1)
    off = np.minimum(np.abs(sizes / edges - 1), np.abs(sizes / faces - 1))
    if (off <= _MAX_SIZE_DIFFERENCE).all():
        return
    if (sizes == 1).all():
        notes.add("pixdim_ignored")
    elif prefer == "sform":
        notes.add("sform_preferred")
    else:
        of_sform, of_pixdim = (" x ".join(f"{mm:.4g}" for mm in lengths) for lengths in (edges, sizes))
        text = f"voxels are {of_sform} by the sform and {of_pixdim} by pixdim; --prefer sform takes the sform"
        raise Refused("forms_differ", text, sform=edges.tolist(), pixdim=sizes.tolist())


def _in_millimetres(affine: Affine, header: Any, notes: set[str]) -> Affine:
    """Return the affine in mm; a unit that would make voxels of metres or nanometres is not believed."""
    try:
        unit = header.get_xyzt_units()[0]
    except KeyError:
        unit = "unknown"
    scaled = np.diag([*[_MILLIMETRES.get(unit, 1.0)] * 3, 1.0]) @ affine
    for candidate, note in ((scaled, f"in_{unit}s"), (affine, "unit_ignored")):
        lengths = np.linalg.norm(candidate[:3, :3], axis=0)
        if ((lengths > MIN_SPACING_MM) & (lengths < MAX_SPACING_MM)).all():
            if unit in ("meter", "micron"):
                notes.add(note)
            return np.asarray(candidate)
    lengths = np.linalg.norm(scaled[:3, :3], axis=0)
    text = f"expected voxels of {MIN_SPACING_MM} to {MAX_SPACING_MM} mm, found {lengths.round(6).tolist()}"
    raise Refused("bad_spacing", f"{text} (xyzt_units: {unit}); write lengths in mm, or state their unit")


def _usable(affine: Matrix) -> bool:
    if not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool((lengths > 1e-6).all() and abs(np.linalg.det(affine[:3, :3] / lengths)) > 0.1)
