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
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from maesil.errors import DISK_FULL, Refused
from maesil.ingest.limits import check_voxels
from maesil.ingest.nifti_geometry import affine_of
from maesil.ingest.scanned import SCANNED_BYTES, Allocate, Scanned, plain_arrays
from maesil.ingest.source_file import is_bomb, is_there, open_source, stamp_of
from maesil.ingest.source_path import SourcePath
from maesil.ingest.stand_in import stand_in_for
from maesil.store.records import Technical
from maesil.types import Planes, Zyx

_MAX_VOLUMES = 64
"""The whole file is read for each of them."""
_IMPOSSIBLE = 1e6
"""A voxel as far from HU as that is as good as infinite: it would bleed into its neighbours when resampled."""
_MAX_NON_FINITE_SHARE = 0.5
_MAX_TRAILING_BYTES = 1 << 26
_BLOCK = 1 << 20
_MAGIC_SINGLE = (b"n+1", b"n+2")


def image_of_pair(header: SourcePath) -> SourcePath | None:
    """Return the file of voxels that goes with a ``.hdr`` or ``.hdr.gz`` file, or None if that is none."""
    stem = header.with_suffix("") if header.suffix.lower() == ".gz" else header
    if stem.suffix.lower() != ".hdr":
        return None
    for suffix in (".img", ".IMG", ".img.gz"):
        if is_there(path := stem.with_suffix(suffix)):
            return path
    return None


@dataclass
class _Stored:
    """What a file holds: its header, and its voxels as a stream."""

    header: Any
    notes: set[str]
    stream: IO[bytes]
    begun: bytes
    """Bytes of voxels that were read already."""
    left: int
    """Bytes of voxels that were not taken yet."""

    def take(self, voxels: int) -> NDArray[Any]:
        """Return the next voxels, in the file's own type."""
        dtype = self.header.get_data_dtype()
        data = np.empty(voxels * dtype.itemsize, dtype=np.uint8)
        begun, self.begun = self.begun[: len(data)], self.begun[len(data) :]
        data[: len(begun)] = np.frombuffer(begun, dtype=np.uint8)
        empty = memoryview(data.data)[len(begun) :]
        self.left -= len(data)
        while len(empty):
            if not (count := self.stream.readinto(empty[: 64 * _BLOCK])):  # type: ignore[attr-defined]
                raise EOFError(f"{len(empty) + self.left} bytes of voxels are missing")
            empty = empty[count:]
        return data.view(dtype)

    def pass_over(self, voxels: int) -> None:
        """Read on past so many voxels."""
        while voxels:
            some = min(voxels, _BLOCK)
            self.take(some)
            voxels -= some

    def finish(self) -> None:
        """Read the stream to its end, where a checksum may stand; `Refused` if much more is there."""
        self.pass_over(self.left // self.header.get_data_dtype().itemsize)
        trailing, more = _read_to_end(self.stream)
        whole = math.prod(int(n) for n in self.header.get_data_shape()) * self.header.get_data_dtype().itemsize
        if "zero_dimension" in self.notes and more >= whole:
            raise Refused("not_3d", "the length of a fourth axis is 0, and more than one volume of voxels is there")
        self.notes |= trailing


@dataclass(frozen=True)
class Claim:
    """What a header claims."""

    decoded_bytes: int = 0
    """Memory the voxels take while they are read."""
    slice_bytes: int = 0
    """Of this what one slice takes."""
    volumes: int = 1
    """Along the fourth axis: time, phases."""


def claim_of(path: SourcePath) -> Claim:
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
    whole, of_a_slice = math.prod(shape) * bytes_of_a_voxel, math.prod(shape[:2]) * bytes_of_a_voxel
    return Claim(whole, of_a_slice, shape[3] if several else 1)


def read_nifti(
    path: SourcePath, *, volume: int | None = None, prefer: str = "", allocate: Allocate = plain_arrays
) -> Scanned:
    """Return the volume of a ``.nii``, ``.nii.gz`` or ``.hdr``/``.img`` file; `Refused` with a code otherwise.

    ``volume`` is its number where the file holds several along a fourth axis; ``prefer`` (``sform`` or ``qform``)
    decides where the two place the volume differently.
    """
    with _refused_by_code(), _opened(path) as stored:
        hu, valid, non_finite = _hu(stored, volume, allocate)
        stored.finish()
    affine = affine_of(stored.header, stored.notes, prefer)
    source: Technical = {
        "kind": "nifti",
        "dtype": str(stored.header.get_data_dtype().newbyteorder("=")),
        "version": "2" if isinstance(stored.header, nib.Nifti2Header) else "1",
    }
    if non_finite:
        share = non_finite / math.prod(hu.shape)
        if share > _MAX_NON_FINITE_SHARE:
            raise Refused("non_finite", f"{share:.0%} of the voxels are NaN or infinite", share=share)
        stored.notes.add("non_finite_voxels")
        source["non_finite_voxels"] = non_finite
    return Scanned(hu=hu, valid=valid, affine=affine, notes=tuple(sorted(stored.notes)), source=source)


@contextlib.contextmanager
def _refused_by_code() -> Iterator[None]:
    """Make a refusal of whatever goes wrong while a file is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nibabel warns of odd values; what matters is checked here
            yield
    except (HeaderDataError, WrapStructError, ValueError, KeyError, OverflowError) as error:
        raise Refused("not_nifti", f"expected NIfTI, found something else ({error})") from error
    except FileNotFoundError as error:
        raise Refused("vanished", "the file was there when the folder was scanned and is gone now") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Refused("damaged_file", f"the file cannot be read to its end ({error}); it was cut or altered") from error
    except OSError as error:  # its full text names the path
        if error.errno in DISK_FULL:  # no fault of the file: there is no room for its voxels
            raise
        raise Refused("unreadable", f"the file cannot be read ({error.strerror or 'input/output error'})") from error


@contextlib.contextmanager
def _opened(path: SourcePath) -> Iterator[_Stored]:
    """Yield a file, its header read and its stream where the voxels begin."""
    with _unpacked(path) as stream:
        head = stream.read(540)
        header, notes = _parse(head)
        if bytes(header["magic"])[:3] in _MAGIC_SINGLE:
            yield _at_voxels(header, path, stream, head, notes)
            return
        _read_to_end(stream)
    image = image_of_pair(path)
    if image is None:
        raise Refused("damaged_file", "expected the .img file of this header beside it, found none")
    with _unpacked(image) as stream:
        yield _at_voxels(header, image, stream, b"", notes)


@contextlib.contextmanager
def _unpacked(path: SourcePath) -> Iterator[IO[bytes]]:
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


def _at_voxels(header: Any, path: SourcePath, stream: IO[bytes], head: bytes, notes: set[str]) -> _Stored:
    """Bring a stream of which ``head`` was read to where its voxels begin."""
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header["vox_offset"])
    least = int(header["sizeof_hdr"]) + 4 if head else 0
    if offset == 0 and not any(head[least - 4 : least]):
        offset = least  # left out, and no extension in between: there is one place they can begin
    if offset < least:
        raise Refused("not_nifti", f"expected the voxels behind the header, found vox_offset {offset}")
    size = math.prod(int(n) for n in shape) * dtype.itemsize
    if is_bomb(stamp_of(path)[0], offset + size):
        raise Refused("size_limit", f"the file claims {size} bytes of voxels, too many for its own size: not CT")
    _skip(stream, max(0, offset - len(head)))
    # The voxels of a small NIfTI-1 may begin within what was read already.
    return _Stored(header, notes, stream, head[offset : offset + size], size)


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


def _hu(stored: _Stored, volume: int | None, allocate: Allocate) -> tuple[Planes, Planes, int]:
    """Return the scaled data as float32 ``[z, y, x]``, which of them are finite, and how many are not.

    Slice by slice, so that a long scan takes no more memory than a short one.
    """
    shape, before = _shape_of(stored.header, volume)
    try:
        slope, inter = stored.header.get_slope_inter()
    except HeaderDataError as error:
        raise Refused("bad_rescale", f"expected a finite scl_slope and scl_inter ({error})") from error
    hu, valid = allocate(shape)
    stored.pass_over(before * math.prod(shape))
    non_finite = 0
    scaled = np.empty(shape[1:], dtype=np.float32)
    for z in range(len(hu)):
        layer = stored.take(math.prod(shape[1:])).reshape(shape[1:])
        with np.errstate(all="ignore"):
            scaled[...] = layer if slope is None else layer.astype(np.float64) * slope + inter
        inside = np.abs(scaled) < _IMPOSSIBLE  # False for NaN too
        non_finite += inside.size - int(np.count_nonzero(inside))
        scaled[~inside] = 0
        hu[z], valid[z] = scaled, inside
    return hu, valid, non_finite


def _shape_of(header: Any, volume: int | None) -> tuple[Zyx, int]:
    """Return the voxels of one volume along ``k j i``, and how many volumes lie before it."""
    shape = tuple(int(n) for n in header.get_data_shape())[::-1]
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    before = 0
    if len(shape) == 4 and volume is not None:
        shape, before = shape[1:], volume
    if len(shape) != 3:
        expected = f"one 3D volume or up to {_MAX_VOLUMES} along a fourth axis"
        raise Refused("not_3d", f"expected {expected}, found shape {shape[::-1]}")
    if min(shape) < 2:
        raise Refused("single_slice", f"expected at least 2 voxels on each axis, found shape {shape[::-1]}")
    return (shape[0], shape[1], shape[2]), before
