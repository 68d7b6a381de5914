"""Reading DICOM: the header of an instance, and the pixels of a stack of slices as HU.

Geometry after PS3.3 C.7.6.2 (Image Plane), intensities after PS3.3 C.11.1 (Modality LUT): HU are what the header says,
slice by slice, in floating point. Nothing is inverted (MONOCHROME1 concerns display only) and nothing is windowed.
"""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import UID, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, JPEGLSNearLossless

from maesil.errors import Refused
from maesil.types import AIR_HU

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")

TECHNICAL_TAGS = (
    "Manufacturer",
    "ManufacturerModelName",
    "SliceThickness",
    "KVP",
    "ConvolutionKernel",
    "ReconstructionDiameter",
    "GantryDetectorTilt",
    "PatientPosition",
    "ContrastBolusAgent",
    "LossyImageCompression",
)
"""The only tags that reach the store (allow list)."""

_IDENTITY_TAGS = (
    "SOPInstanceUID",
    "SOPClassUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "IssuerOfPatientID",
)
_PATIENT_TAGS = ("IssuerOfPatientID", "PatientID")
_GEOMETRY_TAGS = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
)
_SPLIT_TAGS = (
    "AcquisitionNumber",
    "KVP",
    "ConvolutionKernel",
    "TemporalPositionIndex",
    "NominalPercentageOfCardiacPhase",
)
_OTHER_TAGS = ("Modality", "ImageType", "FrameOfReferenceUID", "BurnedInAnnotation", "SamplesPerPixel", "BitsAllocated")
_VOXEL_TAGS = (
    *_GEOMETRY_TAGS,
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
_SITK_SYNTAXES = (JPEGLossless, JPEGLosslessSV1)
_LOSSY_SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)


@dataclass(frozen=True)
class InstanceHeader:
    """What planning needs of one DICOM file. Lengths in mm, LPS."""

    path: Path
    sop_instance: str
    sop_class: str
    patient: str
    study: str
    series: str
    modality: str
    image_type: tuple[str, ...]
    rows: int
    columns: int
    frames: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    acquisition: tuple[str, ...]
    """What tells two passes over the same positions apart: acquisition number, kernel, tube voltage, phase."""
    transfer_syntax: str
    technical: dict[str, Any]


def _without_warnings(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Silence pydicom, which warns of each odd value when it is read; what matters is checked here."""

    @functools.wraps(function)
    def quiet(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return quiet


@_without_warnings
def read_header(path: Path) -> InstanceHeader:
    """Read one header; `Refused` with code ``not_ct...`` for other objects, or with what is broken."""
    wanted = list(dict.fromkeys((*_IDENTITY_TAGS, *_GEOMETRY_TAGS, *_SPLIT_TAGS, *_OTHER_TAGS, *TECHNICAL_TAGS)))
    dataset = _read(path, stop_before_pixels=True, specific_tags=wanted)
    try:
        return _instance_header(path, dataset)
    except Refused:
        raise
    except Exception as error:  # values are parsed when they are asked for, and pydicom raises anything then
        raise Refused("bad_header", f"a value of the header cannot be read ({error})") from error


def _instance_header(path: Path, dataset: FileDataset) -> InstanceHeader:
    meta = dataset.file_meta
    sop_class = str(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
    if sop_class not in (CT_IMAGE, *ENHANCED_CT):
        name = UID(sop_class).name if sop_class else "no SOP class"
        raise Refused("not_ct_image", f"expected CT Image Storage, found {name}")
    if (modality := str(dataset.get("Modality") or "CT")) != "CT":
        raise Refused("not_ct_modality", f"expected modality CT, found {modality}")
    return InstanceHeader(
        path=path,
        sop_instance=str(dataset.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID") or ""),
        sop_class=sop_class,
        patient="|".join(filter(None, (str(dataset.get(tag) or "").strip() for tag in _PATIENT_TAGS))),
        study=str(dataset.get("StudyInstanceUID") or ""),
        series=str(dataset.get("SeriesInstanceUID") or ""),
        modality=modality,
        image_type=tuple(str(value).upper() for value in dataset.get("ImageType") or ()),
        rows=int(dataset.get("Rows") or 0),
        columns=int(dataset.get("Columns") or 0),
        frames=int(dataset.get("NumberOfFrames") or 1),
        position=_numbers(dataset, "ImagePositionPatient", 3),
        orientation=_numbers(dataset, "ImageOrientationPatient", 6),
        pixel_spacing=_numbers(dataset, "PixelSpacing", 2),
        acquisition=tuple(str(dataset.get(tag) or "") for tag in _SPLIT_TAGS),
        transfer_syntax=str(meta.get("TransferSyntaxUID") or ""),
        technical=technical_tags(dataset),
    )


def technical_tags(dataset: Dataset) -> dict[str, Any]:
    """Return the allow-listed tags as JSON-ready values."""
    found: dict[str, Any] = {}
    for tag in TECHNICAL_TAGS:
        value = dataset.get(tag)
        if value not in (None, ""):
            number = float(value) if isinstance(value, (int, float)) else None
            if number is None or math.isfinite(number):
                found[tag] = str(value) if number is None else number
    if "ContrastBolusAgent" in found:
        found["ContrastBolusAgent"] = "given"  # free text; that there was one is all that is needed
    return found


@_without_warnings
def pixel_digest(path: Path) -> bytes:
    """Return a SHA-256 over all that decides the voxels of one instance: geometry, rescale, padding, pixel data."""
    dataset = _read(path)
    digest = hashlib.sha256()
    for tag in _VOXEL_TAGS:
        digest.update(f"{tag}={dataset.get(tag)!s};".encode())
    digest.update(b"modality look-up table" if "ModalityLUTSequence" in dataset else b"")
    digest.update(str(dataset.file_meta.get("TransferSyntaxUID")).encode())
    digest.update(_pixel_data(dataset))
    return digest.digest()


def hu_digest(path: Path) -> bytes:
    """Return a SHA-256 over the HU of one slice: equal for copies that differ in encoding or UIDs alone."""
    try:
        hu, valid, _ = read_slice_hu(path)
    except OSError as error:
        raise Refused("unreadable", error.strerror or "the file cannot be read") from error
    return hashlib.sha256(hu.tobytes() + valid.tobytes()).digest()


@_without_warnings
def read_slice_hu(path: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_], set[str]]:
    """Return one slice as HU ``[y, x]``, which of its pixels are inside the scan, and notes.

    Padding (PS3.3 C.7.5.1.1.2) is air outside the scan. `Refused` for what cannot be decoded or is not HU.
    """
    dataset = _read(path)
    notes: set[str] = set()
    if "ModalityLUTSequence" in dataset:
        raise Refused("modality_lut", "expected a rescale slope and intercept, found a modality look-up table")
    if (kind := str(dataset.get("RescaleType") or "HU")) not in ("HU", "US"):
        raise Refused("not_hu", f"expected RescaleType HU, found {kind}")
    if dataset.get("RescaleSlope") is None or dataset.get("RescaleIntercept") is None:
        notes.add("no_rescale_tags")
    slope, intercept = rescale_of(dataset)
    if str(dataset.get("LossyImageCompression") or "00") == "01" or _syntax(dataset) in _LOSSY_SYNTAXES:
        notes.add("lossy")
    stored = _decode(path, dataset, slope, intercept)
    hu = (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    valid = ~_padding(dataset, stored, slope, intercept, notes)
    hu[~valid] = AIR_HU
    return hu, valid, notes


def rescale_of(dataset: Dataset) -> tuple[float, float]:
    """Return (slope, intercept) of a dataset or of a functional group; 1 and 0 where absent."""
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    result = float(1 if slope is None else slope), float(0 if intercept is None else intercept)
    if result[0] == 0 or not np.isfinite(result).all():
        raise Refused("bad_rescale", f"expected a finite, non-zero slope, found slope {slope}, intercept {intercept}")
    return result


def _read(path: Path, **options: Any) -> FileDataset:
    try:
        return pydicom.dcmread(path, force=True, **options)
    except FileNotFoundError as error:
        raise Refused("vanished", "the file was there when the folder was scanned and is gone now") from error
    except OSError:
        raise
    except Exception as error:  # a broken file makes pydicom raise anything
        raise Refused("bad_dicom", f"the file cannot be parsed as DICOM ({error})") from error


def _numbers(dataset: Dataset, tag: str, count: int) -> tuple[float, ...] | None:
    values = dataset.get(tag)
    if values is None or isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        return None
    numbers = tuple(float(value) for value in values)
    return numbers if np.isfinite(numbers).all() else None


def _syntax(dataset: FileDataset) -> Any:
    return dataset.file_meta.get("TransferSyntaxUID")


def _pixel_data(dataset: Dataset) -> bytes:
    data = dataset.get("PixelData")
    if not data:
        raise Refused("no_pixels", "expected pixel data, found none; the file was cut or holds only a header")
    return bytes(data)


def _decode(path: Path, dataset: FileDataset, slope: float, intercept: float) -> NDArray[Any]:
    """Return the stored values ``[y, x]`` of one slice."""
    _pixel_data(dataset)
    syntax = _syntax(dataset)
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        raise Refused("colour", f"expected one sample a pixel, found {dataset.SamplesPerPixel}")
    try:
        if syntax in _SITK_SYNTAXES:
            stored = _decode_with_sitk(path, slope, intercept)
        else:
            stored = pixel_array(dataset, raw=True)
    except Exception as error:  # decoders raise anything; a slice that does not decode costs one volume
        raise Refused(*_decode_failure(syntax, error)) from error
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise Refused("bad_pixels", f"expected {dataset.Rows} x {dataset.Columns} pixels, decoded {stored.shape}")
    return np.asarray(stored)


def _decode_failure(syntax: Any, error: Exception) -> tuple[str, str]:
    if syntax is None:
        return "no_transfer_syntax", "the file does not say how its pixels are encoded"
    if syntax in _SITK_SYNTAXES:  # decoded by SimpleITK, whose messages hold the path
        return "bad_pixels", "the pixel data cannot be decoded; the file was cut or damaged"
    try:
        decoder = get_decoder(UID(syntax))
    except NotImplementedError:
        return "unknown_transfer_syntax", f"no decoder is known for transfer syntax {syntax}"
    if not decoder.is_available:
        return "missing_decoder", f"{UID(syntax).name} needs one of: {'; '.join(decoder.missing_dependencies)}"
    return (
        "bad_pixels",
        f"the pixel data cannot be decoded ({_first_line(error)}); the file was cut or damaged",
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _decode_with_sitk(path: Path, slope: float, intercept: float) -> NDArray[Any]:
    """Decode JPEG Lossless by the decoder inside SimpleITK (GDCM), which applies the rescale; take it off again."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    hu = sitk.GetArrayFromImage(reader.Execute())
    return np.asarray(np.rint((hu.reshape(hu.shape[-2:]).astype(np.float64) - intercept) / slope))


def _padding(
    dataset: Dataset, stored: NDArray[Any], slope: float, intercept: float, notes: set[str]
) -> NDArray[np.bool_]:
    """Return where stored values are padding.

    A padding value that maps into the range of tissue is not believed: many files carry a stale 0 there, and believing
    it would turn water into air.
    """
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, dtype=bool)
    last = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted(_as_stored(dataset, value) for value in (first, first if last is None else last))
    low_hu, high_hu = sorted((low * slope + intercept, high * slope + intercept))
    if high_hu > -900 and low_hu < 3071:
        notes.add("padding_value_in_tissue_range_ignored")
        return np.zeros(stored.shape, dtype=bool)
    return np.asarray((stored >= low) & (stored <= high))


def _as_stored(dataset: Dataset, value: Any) -> int:
    """Return a padding value as the stored pixels are: the tag's own signedness is often wrong."""
    bits = int(dataset.BitsAllocated)
    number = int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
    number %= 1 << bits
    return number - (1 << bits) if dataset.PixelRepresentation == 1 and number >= 1 << (bits - 1) else number
