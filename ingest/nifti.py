"""Reading NIfTI: HU from the scaled data, the stream read to its end; `nifti_geometry` says where they lie.

After the NIfTI-1 and NIfTI-2 standards (fields ``dim``, ``scl_slope``, ``scl_inter``, ``vox_offset``).
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
from maesil.ingest.limits import check_voxels
from maesil.ingest.nifti_geometry import affine_of
from maesil.ingest.scanned import SCANNED_BYTES, Allocate, Scanned, plain_arrays
from maesil.ingest.source_file import file_on_disk, is_bomb, is_there, open_source
from maesil.ingest.stand_in import stand_in_for

_MAX_VOLUMES = 64
"""The whole file is read for each of them."""
_IMPOSSIBLE = 1e6
"""A voxel as far from HU as that is as good as infinite: it would bleed into its neighbours when resampled."""
_MAX_NON_FINITE_SHARE = 0.5
_MAX_TRAILING_BYTES = 1 << 26
_BLOCK = 1 << 20
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
            header, _ = _parse(stream.read(540))
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
    affine = affine_of(stored.header, stored.notes, prefer)
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
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused("damaged_file", f"the file cannot be read to its end ({error}); it was cut or altered") from error
    except OSError as error:  # its full text names the path
        raise Refused("unreadable", f"the file cannot be read ({error.strerror or 'input/output error'})") from error


def _read_single_or_pair(path: Path) -> _Stored:
    with _unpacked(path) as stream:
        head = stream.read(540)
        header, notes = _parse(head)
        if bytes(header["magic"])[:3] in _MAGIC_SINGLE:
            return _voxels(header, path, stream, head, notes)
        _read_to_end(stream)
    image = image_of_pair(path)
    if image is None:
        raise Refused("damaged_file", "expected the .img file of this header beside it, found none")
    with _unpacked(image) as stream:
        return _voxels(header, image, stream, b"", notes)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    with open_source(path) as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip.open(file) if compressed else contextlib.nullcontext(file) as stream:
            yield stream  # type: ignore[misc]


def _parse(head: bytes) -> tuple[Any, set[str]]:
    """Return the header, and what was noticed; extensions, which may lie behind it, hold nothing that is needed."""
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    if not sizes & {348, 540}:
        _refuse_what_is_no_nifti(head)
    kind: Any = nib.Nifti2Header if 540 in sizes else nib.Nifti1Header
    size = kind.sizeof_hdr
    header = kind(head[:size], check=False)
    unused = header["dim"][4 : 1 + min(max(int(header["dim"][0]), 0), 7)]
    notes = {"zero_dimension"} if (unused == 0).any() else set()
    unused[unused == 0] = 1  # "dim[i] = 1 for all i > dim[0]", and some writers leave 0
    check_voxels(header.get_data_shape())
    if len(header.get_data_shape()) < 3:
        raise Refused("not_3d", f"expected three axes, found shape {header.get_data_shape()}")
    if header.get_data_dtype().kind not in "iuf":
        raise Refused("bad_dtype", f"expected integers or floats, found {header.get_data_dtype()}")
    return header, notes


def _refuse_what_is_no_nifti(head: bytes) -> None:
    if stand_in := stand_in_for(head):
        raise Refused("not_fetched", f"expected NIfTI, found {stand_in}")
    found = f"{head[:4]!r}" if head else "an empty file"
    if head.lstrip()[:1] == b"<":
        found = "a web page or XML: a download that failed"
    raise Refused("not_nifti", f"expected the header size 348 or 540 at the start, found {found}")


def _voxels(header: Any, path: Path, stream: IO[bytes], head: bytes, notes: set[str]) -> _Stored:
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
    trailing, more = _read_to_end(stream)
    if "zero_dimension" in notes and more >= size:
        raise Refused("not_3d", "the length of a fourth axis is 0, and more than one volume of voxels is there")
    return _Stored(header, data.view(dtype).reshape(tuple(shape)[::-1]), notes | trailing)


def _skip(stream: IO[bytes], count: int) -> None:
    if count > _MAX_TRAILING_BYTES:
        raise Refused("size_limit", f"expected the voxels behind the header, found them {count} bytes on")
    if len(stream.read(count)) != count:
        raise EOFError("the file ends within its header")


def _read_to_end(stream: IO[bytes]) -> tuple[set[str], int]:
    """Read on to the end, where the checksum of a gzip stream stands; `Refused` if there is much more.

    Return what was noticed and how many bytes were left.
    """
    left = _MAX_TRAILING_BYTES
    try:
        while part := stream.read(_BLOCK):
            left -= len(part)
            if left < 0:
                raise Refused("size_limit", f"more than {_MAX_TRAILING_BYTES} bytes follow the voxels")
    except gzip.BadGzipFile as error:
        if not str(error).startswith("Not a gzipped file"):  # a wrong checksum or length
            raise
        return {"trailing_bytes"}, _MAX_TRAILING_BYTES - left  # behind a stream that is whole
    return set(), _MAX_TRAILING_BYTES - left


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
