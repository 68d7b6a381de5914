"""Reading NIfTI: geometry from sform or qform, HU from the scaled data, the stream read to its end.

After the NIfTI-1 and NIfTI-2 standards (fields ``sform_code``, ``qform_code``, ``scl_slope``, ``scl_inter``).
"""

from __future__ import annotations

import gzip
import io
import warnings
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.geometry import Affine, from_nifti
from maesil.ingest.scanned import Scanned
from maesil.ingest.series import MAX_VOXELS

_MAX_FORM_DIFFERENCE_MM = 1.0
_MAX_NON_FINITE_SHARE = 0.5
_BLOCK = 1 << 20


def read_nifti(path: Path) -> Scanned:
    """Return the volume of a ``.nii``, ``.nii.gz`` or ``.hdr``/``.img`` file; `Refused` with a code otherwise."""
    image = _open(path)
    notes: set[str] = set()
    affine = _affine(image, notes)
    data = _hu(image, path)
    hu = np.ascontiguousarray(data.transpose(2, 1, 0))
    valid = np.isfinite(hu)
    if not valid.all():
        share = 1 - float(valid.mean())
        if share > _MAX_NON_FINITE_SHARE:
            raise Refused("non_finite", f"{share:.0%} of the voxels are NaN or infinite", share=share)
        notes.add("non_finite_voxels")
        hu[~valid] = 0
    source = {"kind": "nifti", "dtype": str(image.get_data_dtype().newbyteorder("=")), "version": _version(image)}
    return Scanned(hu=hu, valid=valid, affine=affine, notes=tuple(sorted(notes)), source=source)


def _version(image: Any) -> str:
    return "2" if isinstance(image, nib.Nifti2Image) else "1"


def _open(path: Path) -> SpatialImage:
    """Return the image with its data not yet converted; the whole stream was read and its checksum holds."""
    try:
        if path.suffix.lower() == ".hdr":
            return nib.load(path)
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if compressed else path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nibabel warns of odd values; what matters is checked here
            return _from_stream(stream)
    except (ImageFileError, HeaderDataError, WrapStructError, ValueError, KeyError) as error:
        raise Refused("not_nifti", f"expected NIfTI, found something else ({error})") from error
    except FileNotFoundError as error:
        raise Refused("vanished", "the file was there when the folder was scanned and is gone now") from error
    except (EOFError, zlib.error, OSError) as error:
        why = getattr(error, "strerror", None) or error  # the full text of an OSError names the path
        raise Refused("damaged_file", f"the file cannot be read to its end ({why}); it was cut or altered") from error


def _from_stream(stream: Any) -> SpatialImage:
    head = stream.read(540)
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    if not sizes & {348, 540}:
        raise Refused("not_nifti", f"expected the header size 348 or 540 at the start, found {head[:4]!r}")
    kind = nib.Nifti2Image if 540 in sizes else nib.Nifti1Image
    header = kind.header_class.from_fileobj(io.BytesIO(head), check=False)
    _check_size(header)
    expected = int(header.get_data_offset()) + int(np.prod(header.get_data_shape())) * header.get_data_dtype().itemsize
    data = head + _read_exactly(stream, expected - len(head))
    while stream.read(_BLOCK):  # to the end: the checksum of a gzip stream stands there
        pass
    return kind.from_bytes(data)


def _check_size(header: Any) -> None:
    shape = header.get_data_shape()
    if not shape or any(n <= 0 for n in shape) or np.prod([float(n) for n in shape]) > MAX_VOXELS:
        raise Refused("size_limit", f"expected 1 to {MAX_VOXELS} voxels, found shape {shape}")


def _read_exactly(stream: Any, count: int) -> bytes:
    parts = []
    while count > 0:
        part = stream.read(min(count, 64 * _BLOCK))
        if not part:
            raise EOFError(f"{count} bytes of voxels are missing")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _affine(image: Any, notes: set[str]) -> Affine:
    header = image.header
    sform, sform_code = header.get_sform(coded=True)
    qform, qform_code = _qform(header)
    if sform_code and not _usable(sform):
        notes.add("singular_sform_ignored")
        sform_code = 0
    if not sform_code and not qform_code:
        raise Refused(
            "no_orientation", "expected an sform or a qform, found neither; the header does not say where it lies"
        )
    if sform_code and qform_code:
        _check_forms_agree(sform, qform, image.shape)
    chosen = sform if sform_code else qform
    if chosen is None or not _usable(chosen):
        raise Refused("bad_affine", "the affine of the header is singular")
    return from_nifti(chosen)


def _qform(header: Any) -> tuple[NDArray[np.float64] | None, int]:
    try:
        qform, code = header.get_qform(coded=True)
    except (HeaderDataError, ValueError):
        return None, 0
    return (qform, int(code)) if code and qform is not None and _usable(qform) else (None, 0)


def _usable(affine: Any) -> bool:
    if affine is None or not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool((lengths > 1e-3).all() and abs(np.linalg.det(affine[:3, :3] / lengths)) > 0.1)


def _check_forms_agree(sform: NDArray[np.float64], qform: NDArray[np.float64] | None, shape: tuple[int, ...]) -> None:
    """Both forms must put the corners of the volume at the same places."""
    assert qform is not None
    corners = np.array([[i, j, k, 1] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)])
    apart = float(np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max())
    if apart > _MAX_FORM_DIFFERENCE_MM:
        raise Refused("forms_differ", f"sform and qform place the volume {apart:.1f} mm apart", apart_mm=apart)


def _hu(image: Any, path: Path) -> NDArray[np.float32]:
    """Return the scaled data as float32 ``[i, j, k]``."""
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise Refused("not_3d", f"expected one 3D volume, found shape {tuple(image.shape)}")
    if min(shape) < 2:
        raise Refused("single_slice", f"expected at least 2 voxels on each axis, found shape {shape}")
    if image.get_data_dtype().kind not in "iuf":
        raise Refused("bad_dtype", f"expected integers or floats, found {image.get_data_dtype()}")
    try:
        data = np.asanyarray(image.dataobj, dtype=None)
    except (OSError, ValueError, EOFError) as error:
        raise Refused("damaged_file", f"the voxels cannot be read ({error})") from error
    return np.asarray(data, dtype=np.float32).reshape(shape)
