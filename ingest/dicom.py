"""The pixels of DICOM slices as HU, and digests of what decides them.

Intensities after PS3.3 C.11.1 (Modality LUT): HU are what the header says, slice by slice, in floating point. Nothing
is inverted (MONOCHROME1 concerns display only) and nothing is windowed.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset

from maesil.errors import Refused
from maesil.ingest.encoded import StoredFrame, decode_frames
from maesil.ingest.header import ENHANCED_CT, GEOMETRY_TAGS, frame_datasets, without_warnings
from maesil.ingest.source_file import read_dataset
from maesil.ingest.source_path import SourcePath
from maesil.ingest.values import number_of, tags_of, texts_of, whole_number_of
from maesil.types import AIR_HU

MAX_INSTANCE_BYTES = 1 << 31
_SURELY_OUTSIDE_HU = (-900, 3071)
_EXACT_IN_FLOAT32 = 1 << 23
_UNIT, _RESCALE = tags_of("RescaleType"), tags_of("RescaleSlope", "RescaleIntercept")
_HU_UNITS = {"", "HU", "US"}
"""Units (PS3.3 C.11.1.1.2) of CT numbers; US says nothing."""
_VOXEL_TAGS = tags_of(
    *GEOMETRY_TAGS,
    "RescaleSlope",
    "RescaleIntercept",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "PixelRepresentation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "SamplesPerPixel",
    "RescaleType",
)


@dataclass(frozen=True)
class SliceHu:
    """One slice: HU ``[y, x]``, which of its pixels are inside the scan, and notes."""

    hu: NDArray[np.float32]
    valid: NDArray[np.bool_]
    notes: frozenset[str]


@without_warnings
def pixel_digest(path: SourcePath) -> bytes:
    """Return a SHA-256 over all that decides the voxels of one object: geometry, rescale, padding, pixel data."""
    return _digest(read_dataset(path, max_bytes=MAX_INSTANCE_BYTES))


def _digest(dataset: FileDataset) -> bytes:
    digest = hashlib.sha256()
    for frame in frame_datasets(dataset) if _is_enhanced(dataset) else [dataset]:
        digest.update(repr(texts_of(frame, _VOXEL_TAGS)).encode())
        digest.update(b"modality look-up table" if "ModalityLUTSequence" in frame else b"")
    digest.update(str(dataset.file_meta.get("TransferSyntaxUID")).encode())
    digest.update(_pixel_data(dataset))
    return digest.digest()


def hu_digests(path: SourcePath, frames: Sequence[int | None]) -> list[bytes]:
    """Return a SHA-256 over the HU of each slice: equal for copies that differ in encoding or UIDs alone."""
    try:
        found = read_slices_hu((path, frame) for frame in frames)
        return [hashlib.sha256(slice_.hu.tobytes() + slice_.valid.tobytes()).digest() for slice_ in found]
    except OSError as error:
        raise Refused("unreadable", error.strerror or "the file cannot be read") from error


def read_slice_hu(path: SourcePath) -> tuple[NDArray[np.float32], NDArray[np.bool_], set[str]]:
    """Return one single-frame slice as HU ``[y, x]``, which of its pixels are inside the scan, and notes."""
    (found,) = read_slices_hu([(path, None)])
    return found.hu, found.valid, set(found.notes)


def read_slices_hu(
    planes: Iterable[tuple[SourcePath, int | None]], digests: dict[SourcePath, bytes] | None = None
) -> Iterator[SliceHu]:
    """Yield slices in the order asked for, each by its file and, in a multi-frame object, its frame.

    The `pixel_digest` of each file is noted in ``digests``, if given. Padding (PS3.3 C.7.5.1.1.2) is air outside the
    scan. `Refused` for what cannot be decoded or is not HU.
    """
    for path, group in groupby(planes, key=lambda plane: plane[0]):
        yield from _slices_of(path, [frame for _, frame in group], digests)


def _slices_of(
    path: SourcePath, wanted: list[int | None], digests: dict[SourcePath, bytes] | None
) -> Iterator[SliceHu]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of each odd value; what matters is checked here
        dataset = read_dataset(path, max_bytes=MAX_INSTANCE_BYTES)
        _pixel_data(dataset)
        if digests is not None:
            digests[path] = _digest(dataset)  # before anything is supplied that decoding needs
        numbers = [frame for frame in wanted if frame is not None]
        with _values_are_refused():
            headers = list(islice(frame_datasets(dataset), max(numbers) + 1)) if numbers else []
        for frame, decoded in zip(wanted, decode_frames(dataset, wanted), strict=True):
            with _values_are_refused():
                found = _slice_hu(dataset if frame is None else headers[frame], decoded)
            yield found


@contextmanager
def _values_are_refused() -> Iterator[None]:
    """Make a refusal of what pydicom raises where a header holds a value that cannot be meant."""
    try:
        yield
    # pydicom converts a value when it is asked for, and names no error of its own for one that it cannot: a number that
    # is text, too large or missing, an empty sequence, an unknown kind of value. Each would end the whole run.
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, NotImplementedError) as error:
        raise Refused("bad_header", f"a value of the header cannot be used ({type(error).__name__})") from error


def _slice_hu(header: Dataset, decoded: StoredFrame) -> SliceHu:
    stored, notes = decoded.stored, set(decoded.notes)
    if "ModalityLUTSequence" in header:
        raise Refused("modality_lut", "expected a rescale slope and intercept, found a modality look-up table")
    if not set(texts_of(header, _UNIT)["RescaleType"].upper().split("\\")) <= _HU_UNITS:
        raise Refused("not_hu", "expected RescaleType HU, found another unit")
    if not all(texts_of(header, _RESCALE).values()):
        notes.add("no_rescale_tags")
    slope, intercept = rescale_of(header)
    hu = _rescaled(stored, slope, intercept)
    padding = _padding(header, stored, slope, intercept, notes)
    np.copyto(hu, np.float32(AIR_HU), where=padding)
    return SliceHu(hu, ~padding, frozenset(notes))


def _rescaled(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[np.float32]:
    """Return slope * stored + intercept, rounded once to float32."""
    if slope == 1 and stored.dtype.itemsize <= 2 and intercept.is_integer() and abs(intercept) < _EXACT_IN_FLOAT32:
        return stored.astype(np.float32) + np.float32(intercept)  # whole numbers, exact at half the cost
    return (stored.astype(np.float64) * slope + intercept).astype(np.float32)


def rescale_of(dataset: Dataset) -> tuple[float, float]:
    """Return (slope, intercept) of a slice; 1 and 0 where absent."""
    slope = number_of(dataset, "RescaleSlope", "bad_rescale")
    intercept = number_of(dataset, "RescaleIntercept", "bad_rescale")
    if slope == 0:
        raise Refused("bad_rescale", "expected a slope that is not zero, found 0")
    return 1.0 if slope is None else slope, 0.0 if intercept is None else intercept


def _is_enhanced(dataset: FileDataset) -> bool:
    return str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")) in ENHANCED_CT


def _pixel_data(dataset: Dataset) -> bytes:
    data = dataset.get("PixelData")
    if not data:
        other = any(name in dataset for name in ("FloatPixelData", "DoubleFloatPixelData"))
        found = "numbers in floating point" if other else "none; the file was cut or holds only a header"
        raise Refused("no_pixels", f"expected pixel data, found {found}")
    return bytes(data)


def _padding(
    header: Dataset, stored: NDArray[Any], slope: float, intercept: float, notes: set[str]
) -> NDArray[np.bool_]:
    """Return where stored values are padding.

    A padding value that maps into the range of tissue is believed at the margin of the image only, and only if it fills
    the corners: many files carry a stale 0 there, and believing it would turn water into air.
    """
    none = np.zeros(stored.shape, dtype=bool)
    values = [_as_stored(header, header.get(tag)) for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if values[0] is None:
        return none
    low, high = sorted((values[0], values[0] if values[1] is None else values[1]))
    low_hu, high_hu = sorted((low * slope + intercept, high * slope + intercept))
    where = np.asarray((stored >= low) & (stored <= high))
    if high_hu <= _SURELY_OUTSIDE_HU[0] or low_hu >= _SURELY_OUTSIDE_HU[1]:
        return where
    if low == high and where[[0, 0, -1, -1], [0, -1, 0, -1]].all() and not where.all():
        notes.add("padding_value_in_tissue_range")
        return _margin(where)
    notes.add("padding_value_in_tissue_range_ignored")
    return none


def _margin(where: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the part of a mask that is connected with a corner of the image."""
    rows, columns = where.shape
    seeds = [(x, y) for y in (0, rows - 1) for x in (0, columns - 1)]
    connected = sitk.ConnectedThreshold(sitk.GetImageFromArray(where.astype(np.uint8)), seeds, lower=1, upper=1)
    return np.asarray(sitk.GetArrayFromImage(connected) > 0)


def _as_stored(header: Dataset, value: Any) -> int | None:
    """Return a padding value as the stored pixels are: the tag's own signedness is often wrong."""
    bits = whole_number_of(header, "BitsAllocated") or 16
    try:
        number = int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
    except (TypeError, ValueError):  # absent, or several values: none can be meant
        return None
    number %= 1 << bits
    signed = whole_number_of(header, "PixelRepresentation") == 1
    return number - (1 << bits) if signed and number >= 1 << (bits - 1) else number
