"""Reading NIfTI: geometry from sform or qform, HU from the scaled data, the stream read to its end.

After the NIfTI-1 and NIfTI-2 standards (fields ``sform_code``, ``qform_code``, ``scl_slope``, ``scl_inter``,
``xyzt_units``, ``vox_offset``).
"""

from __future__ import annotations

import contextlib
import gzip
import math
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.geometry import Affine, from_nifti
from maesil.ingest.limits import MAX_SPACING_MM, MIN_SPACING_MM, check_voxels
from maesil.ingest.scanned import SCANNED_BYTES, Allocate, Scanned, plain_arrays
from maesil.ingest.source_file import file_on_disk, is_bomb, is_there, open_source

_MAX_FORM_DIFFERENCE_MM = 1.0
_MAX_VOLUMES = 64
"""The whole file is read for each of them."""
_IMPOSSIBLE = 1e6
"""A voxel as far from HU as that is as good as infinite: it would bleed into its neighbours when resampled."""
_MAX_NON_FINITE_SHARE = 0.5
_MAX_TRAILING_BYTES = 1 << 26
_BLOCK = 1 << 20
_MILLIMETRES = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}
_MAGIC_SINGLE = (b"n+1", b"n+2")


@dataclass(frozen=True)
class _Stored:
    """What a file holds, not yet converted."""

    header: Any
    voxels: NDArray[Any]
    """In the file's own dtype, axes ``k j i`` (and more)."""
    notes: set[str]


def image_of_pair(header: Path) -> Path | None:
    """Return the file of voxels that goes with a ``.hdr`` or ``.hdr.gz`` file, or None if that is none."""
    stem = header.with_suffix("") if header.suffix.lower() == ".gz" else header
    if stem.suffix.lower() != ".hdr":
        return None
    for suffix in (".img", ".IMG", ".img.gz"):
        if is_there(path := stem.with_suffix(suffix)):
            return path
    return None


@dataclass(frozen=True)
class Claim:
    """What a header claims."""

    decoded_bytes: int = 0
    """Memory the voxels take while they are read."""
    volumes: int = 1
    """Along the fourth axis: time, phases."""


def claim_of(path: Path) -> Claim:
    """Return what a header claims; of one that cannot be read, that there is one volume of no size."""
    try:
        with warnings.catch_warnings(), _unpacked(path) as stream:
            warnings.simplefilter("ignore")
            header = _parse(stream.read(540))
    except Exception:  # whatever is wrong with it is said when it is read
        return Claim()
    shape = [int(n) for n in header.get_data_shape()]
    several = len(shape) > 3 and shape[3] <= _MAX_VOLUMES and math.prod(shape[4:]) == 1
    bytes_of_a_voxel = int(header.get_data_dtype().itemsize) + SCANNED_BYTES
    return Claim(math.prod(shape) * bytes_of_a_voxel, shape[3] if several else 1)


def read_nifti(
    path: Path, *, volume: int | None = None, prefer: str = "", allocate: Allocate = plain_arrays
) -> Scanned:
    """Return the volume of a ``.nii``, ``.nii.gz`` or ``.hdr``/``.img`` file; `Refused` with a code otherwise.

    ``volume`` is its number where the file holds several along a fourth axis; ``prefer`` (``sform`` or ``qform``)
    decides where the two place the volume differently.
    """
    stored = _read(path)
    affine = _affine(stored.header, stored.notes, prefer)
    source: dict[str, Any] = {
        "kind": "nifti",
        "dtype": str(stored.header.get_data_dtype().newbyteorder("=")),
        "version": "2" if isinstance(stored.header, nib.Nifti2Header) else "1",
    }
    hu, valid = _hu(stored, volume, allocate)
    for layer, inside in zip(hu, valid, strict=True):
        np.less(np.abs(layer), _IMPOSSIBLE, out=inside)  # False for NaN too
    if not valid.all():
        share = 1 - float(valid.mean())
        if share > _MAX_NON_FINITE_SHARE:
            raise Refused("non_finite", f"{share:.0%} of the voxels are NaN or infinite", share=share)
        stored.notes.add("non_finite_voxels")
        source["non_finite_voxels"] = int(hu.size - np.count_nonzero(valid))
        hu[~valid] = 0
    return Scanned(hu=hu, valid=valid, affine=affine, notes=tuple(sorted(stored.notes)), source=source)


def _read(path: Path) -> _Stored:
    """Return header and voxels; the whole stream was read and its checksum holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nibabel warns of odd values; what matters is checked here
            return _read_single_or_pair(path)
    except (HeaderDataError, WrapStructError, ValueError, KeyError, OverflowError) as error:
        raise Refused("not_nifti", f"expected NIfTI, found something else ({error})") from error
    except FileNotFoundError as error:
        raise Refused("vanished", "the file was there when the folder was scanned and is gone now") from error
    except (EOFError, zlib.error, OSError) as error:
        why = getattr(error, "strerror", None) or error  # the full text of an OSError names the path
        raise Refused("damaged_file", f"the file cannot be read to its end ({why}); it was cut or altered") from error


def _read_single_or_pair(path: Path) -> _Stored:
    with _unpacked(path) as stream:
        head = stream.read(540)
        header = _parse(head)
        if bytes(header["magic"])[:3] in _MAGIC_SINGLE:
            return _voxels(header, path, stream, head)
        _read_to_end(stream)
    image = image_of_pair(path)
    if image is None:
        raise Refused("damaged_file", "expected the .img file of this header beside it, found none")
    with _unpacked(image) as stream:
        return _voxels(header, image, stream, b"")


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    with open_source(path) as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip.open(file) if compressed else contextlib.nullcontext(file) as stream:
            yield stream  # type: ignore[misc]


def _parse(head: bytes) -> Any:
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    if not sizes & {348, 540}:
        raise Refused("not_nifti", f"expected the header size 348 or 540 at the start, found {head[:4]!r}")
    kind, size = (nib.Nifti2Header, 540) if 540 in sizes else (nib.Nifti1Header, 348)
    header = kind(head[:size], check=False)  # extensions, which may lie behind it, hold nothing that is needed
    check_voxels(header.get_data_shape())
    if len(header.get_data_shape()) < 3:
        raise Refused("not_3d", f"expected three axes, found shape {header.get_data_shape()}")
    if header.get_data_dtype().kind not in "iuf":
        raise Refused("bad_dtype", f"expected integers or floats, found {header.get_data_dtype()}")
    return header


def _voxels(header: Any, path: Path, stream: IO[bytes], head: bytes) -> _Stored:
    """Read the voxels of a stream of which ``head`` was read."""
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header["vox_offset"])
    least = int(header["sizeof_hdr"]) + 4 if head else 0
    if offset == 0 and not any(head[least - 4 : least]):
        offset = least  # left out, and no extension in between: there is one place they can begin
    if offset < least:
        raise Refused("not_nifti", f"expected the voxels behind the header, found vox_offset {offset}")
    size = int(np.prod([int(n) for n in shape])) * dtype.itemsize
    if is_bomb(file_on_disk(path).stat().st_size, offset + size):
        raise Refused("size_limit", f"the file claims {size} bytes of voxels, too many for its own size: not CT")
    data = np.empty(size, dtype=np.uint8)
    begun = head[offset : offset + size]  # the voxels of a small NIfTI-1 may begin within what was read already
    _skip(stream, max(0, offset - len(head)))
    data[: len(begun)] = np.frombuffer(begun, dtype=np.uint8)
    filled = memoryview(data.data)[len(begun) :]
    while len(filled):
        if not (count := stream.readinto(filled[: 64 * _BLOCK])):  # type: ignore[attr-defined]
            raise EOFError(f"{len(filled)} bytes of voxels are missing")
        filled = filled[count:]
    notes = _read_to_end(stream)
    return _Stored(header, data.view(dtype).reshape(tuple(shape)[::-1]), notes)


def _skip(stream: IO[bytes], count: int) -> None:
    if count > _MAX_TRAILING_BYTES:
        raise Refused("size_limit", f"expected the voxels behind the header, found them {count} bytes on")
    if len(stream.read(count)) != count:
        raise EOFError("the file ends within its header")


def _read_to_end(stream: IO[bytes]) -> set[str]:
    """Read on to the end, where the checksum of a gzip stream stands; `Refused` if there is much more."""
    left = _MAX_TRAILING_BYTES
    try:
        while part := stream.read(_BLOCK):
            left -= len(part)
            if left < 0:
                raise Refused("size_limit", f"more than {_MAX_TRAILING_BYTES} bytes follow the voxels")
    except gzip.BadGzipFile as error:
        if not str(error).startswith("Not a gzipped file"):  # a wrong checksum or length
            raise
        return {"trailing_bytes"}  # behind a stream that is whole
    return set()


def _affine(header: Any, notes: set[str], prefer: str) -> Affine:
    sform, sform_code = header.get_sform(coded=True)
    qform, qform_code = _qform(header)
    if sform_code and not _usable(sform):
        notes.add("singular_sform_ignored")
        sform_code = 0
    if not sform_code and not qform_code:
        raise Refused(
            "no_orientation", "expected an sform or a qform, found neither; the header does not say where it lies"
        )
    if sform_code and qform_code and (apart := _apart_mm(sform, qform, header.get_data_shape())):
        if prefer not in ("sform", "qform"):
            text = f"sform and qform place the volume {apart:.1f} mm apart; --prefer sform or --prefer qform decides"
            raise Refused("forms_differ", text, apart_mm=apart)
        notes.add(f"{prefer}_preferred")
    chosen = qform if not sform_code or (qform_code and "qform_preferred" in notes) else sform
    if chosen is None or not _usable(chosen):
        raise Refused("bad_affine", "the affine of the header is singular")
    return _in_millimetres(from_nifti(chosen), header, notes)


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
    text = f"expected voxels of {MIN_SPACING_MM} to {MAX_SPACING_MM} mm, found {lengths.round(4).tolist()}"
    raise Refused("bad_spacing", text)


def _qform(header: Any) -> tuple[NDArray[np.float64] | None, int]:
    if header["pixdim"][0] == 0:
        header = header.copy()
        header["pixdim"][0] = 1  # so says nifti1.h: "if not -1 or 1, use 1"
    try:
        qform, code = header.get_qform(coded=True)
    except (HeaderDataError, ValueError):
        return None, 0
    return (qform, int(code)) if code and qform is not None and _usable(qform) else (None, 0)


def _usable(affine: Any) -> bool:
    if affine is None or not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool((lengths > 1e-6).all() and abs(np.linalg.det(affine[:3, :3] / lengths)) > 0.1)


def _apart_mm(sform: NDArray[np.float64], qform: NDArray[np.float64] | None, shape: tuple[int, ...]) -> float:
    """Return how far apart (mm) the two forms put a corner of the volume; 0 if they agree."""
    assert qform is not None
    corners = np.array([[i, j, k, 1] for i in (0, shape[0] - 1) for j in (0, shape[1] - 1) for k in (0, shape[2] - 1)])
    apart = float(np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max())
    return apart if apart > _MAX_FORM_DIFFERENCE_MM else 0.0


def _hu(stored: _Stored, volume: int | None, allocate: Allocate) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the scaled data as float32 ``[z, y, x]``, and an array for their validity."""
    voxels = stored.voxels
    while voxels.ndim > 3 and voxels.shape[0] == 1:
        voxels = voxels[0]
    if voxels.ndim == 4 and volume is not None:
        voxels = voxels[volume]
    if voxels.ndim != 3:
        expected = f"one 3D volume or up to {_MAX_VOLUMES} along a fourth axis"
        raise Refused("not_3d", f"expected {expected}, found shape {voxels.shape[::-1]}")
    if min(voxels.shape) < 2:
        raise Refused("single_slice", f"expected at least 2 voxels on each axis, found shape {voxels.shape[::-1]}")
    try:
        slope, inter = stored.header.get_slope_inter()
    except HeaderDataError as error:
        raise Refused("bad_rescale", f"expected a finite scl_slope and scl_inter ({error})") from error
    hu, valid = allocate((voxels.shape[0], voxels.shape[1], voxels.shape[2]))
    for z, layer in enumerate(voxels):  # layer by layer: double precision for a whole volume takes much memory
        with np.errstate(all="ignore"):
            hu[z] = layer if slope is None else layer.astype(np.float64) * slope + inter
    return hu, valid
