"""Write synthetic CT as a scanner would: noise and DICOM series.

The writer serves ``maesil demo`` and the tests. It writes plain CT Image Storage objects (DICOM PS3.3 A.3)
with the attributes that geometry and HU depend on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import ArrayLike, NDArray
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.tag import BaseTag
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import DSfloat

from maesil.types import FloatArray, Spacing


@dataclass(frozen=True)
class SeriesIdentity:
    """Who and what a series is of; every UID follows from these strings: a rerun writes the same files."""

    patient: str = "PHANTOM-0"
    study: str = "study 1"
    series: str = "series 1"
    number: int = 1
    description: str = "CHEST 2.5 B40"
    kernel: str = "B40f"
    rescale: tuple[float, float] = (1.0, -1024.0)  # slope, intercept
    padding: int | None = None  # stored value of voxels outside the reconstruction circle
    extra: dict[str, object] = field(default_factory=dict)  # any other attribute, by DICOM keyword

    def uid(self, *parts: object) -> str:
        """Return a UID that depends on the identity and ``parts`` alone."""
        return str(generate_uid(entropy_srcs=[self.patient, *map(str, parts)]))


def ct_slice(
    hu_yx: FloatArray,
    position: ArrayLike,
    row_step: ArrayLike,
    column_step: ArrayLike,
    number: int,
    who: SeriesIdentity,
) -> FileDataset:
    """Return one CT Image Storage object of ``hu_yx`` (HU, [rows, columns]).

    ``position`` is the centre of the first pixel; ``row_step`` and ``column_step`` lead from one row and one
    column to the next (LPS mm). Pixels are stored as 16 bit signed integers by the identity's rescale.
    """
    stored = _stored(hu_yx, who)
    data = _empty_ct(who, number)
    data.ImagePositionPatient = _decimal(position)
    row, column = np.asarray(row_step, np.float64), np.asarray(column_step, np.float64)
    row_mm, column_mm = float(np.linalg.norm(row)), float(np.linalg.norm(column))
    data.ImageOrientationPatient = _decimal([*(column / column_mm), *(row / row_mm)])
    data.PixelSpacing = _decimal([row_mm, column_mm])
    data.RescaleSlope, data.RescaleIntercept = _decimal(who.rescale)
    data.RescaleType = "HU"
    set_pixels(data, stored)
    if who.padding is not None:
        data.add_new("PixelPaddingValue", "SS", who.padding)
    for keyword, value in who.extra.items():
        setattr(data, keyword, value)
    return data


def _stored(hu_yx: FloatArray, who: SeriesIdentity) -> NDArray[np.int16]:
    """Return the stored values of HU by the identity's rescale."""
    slope, intercept = who.rescale
    stored = np.round((np.asarray(hu_yx, np.float64) - intercept) / slope)
    if stored.min() < -32768 or stored.max() > 32767:
        raise ValueError(f"HU {hu_yx.min():.0f}..{hu_yx.max():.0f} do not fit 16 bits at slope {slope}")
    return stored.astype("<i2")


def set_pixels(data: FileDataset, stored: NDArray[np.integer]) -> None:  # type: ignore[type-arg]
    """Store 8 or 16 bit pixels uncompressed, and the attributes that describe them."""
    data.Rows, data.Columns = stored.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * stored.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    data["PixelData"].VR = "OW"


def ct_series(hu_zyx: FloatArray, affine: ArrayLike, who: SeriesIdentity) -> list[FileDataset]:
    """Return the slices of a volume in index order; ``affine`` takes [z, y, x, 1] to LPS mm.

    A sheared affine gives the positions of a tilted gantry: the slices keep their orientation.
    """
    matrix = np.asarray(affine, np.float64)
    step, row, column, origin = matrix[:3].T
    thickness = abs(float(np.cross(column, row) @ step) / float(np.linalg.norm(np.cross(column, row))))
    slices: list[FileDataset] = []
    shared: dict[BaseTag, DataElement | RawDataElement] = {}
    for k, hu_yx in enumerate(hu_zyx):
        if k == 0:
            first = ct_slice(hu_yx, origin, row, column, 1, who)
            first.SliceThickness = DSfloat(thickness, auto_format=True)
            shared = _encoded(first)
            slices.append(first)
        else:
            slices.append(_next_slice(slices[0], shared, hu_yx, origin + k * step, k + 1, who))
    return slices


def _encoded(data: FileDataset) -> dict[BaseTag, DataElement | RawDataElement]:
    """Return all elements but the pixels as the bytes of a file, which many data sets can share: none can change them.

    Most of what a slice costs is turning values into elements, and these into bytes. A series does it once.
    """
    file = BytesIO()
    data.save_as(file, enforce_file_format=True)
    read = pydicom.dcmread(BytesIO(file.getvalue()), stop_before_pixels=True)
    return {tag: read.get_item(tag) for tag in iter(read.keys())}


def _next_slice(
    first: FileDataset,
    shared: dict[BaseTag, DataElement | RawDataElement],
    hu_yx: FloatArray,
    position: ArrayLike,
    number: int,
    who: SeriesIdentity,
) -> FileDataset:
    """Return a further slice of the series of ``first``, whose encoded elements it shares where they do not differ."""
    meta = _meta(who, number)
    data = FileDataset("", dict(shared), file_meta=meta, preamble=b"\0" * 128)
    data.set_original_encoding(False, True, data._character_set)
    own = {
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "InstanceNumber": number,
        "ImagePositionPatient": _decimal(position),
    }
    for keyword, value in own.items():
        setattr(data, keyword, who.extra.get(keyword, value))
    data.PixelData = _stored(hu_yx, who).tobytes()
    data["PixelData"].VR = "OW"
    return data


def write_dicom_series(
    folder: Path,
    hu_zyx: FloatArray,
    affine: ArrayLike,
    who: SeriesIdentity | None = None,
    *,
    seed: int | None = None,
) -> list[Path]:
    """Write one CT series below ``folder`` and return its files in slice order.

    With a ``seed`` the file names are random numbers without any order, as a PACS export has them.
    """
    slices = ct_series(hu_zyx, affine, who or SeriesIdentity())
    names = [f"IM{k:05d}.dcm" for k in range(len(slices))]
    if seed is not None:
        drawn = np.random.default_rng(seed).choice(10**8, size=len(slices), replace=False)
        names = [f"{number:08d}.dcm" for number in drawn]
    return save_all(folder, slices, names)


def save_all(folder: Path, slices: Sequence[pydicom.Dataset], names: Sequence[str] | None = None) -> list[Path]:
    """Write data sets as DICOM files into ``folder``, which is created where it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in (names or [f"IM{k:05d}.dcm" for k in range(len(slices))])]
    for path, data in zip(paths, slices, strict=True):
        data.save_as(path, enforce_file_format=True)
    return paths


def grid_affine(spacing: Spacing, origin_xyz: ArrayLike) -> NDArray[np.float64]:
    """Return the affine of an axis-aligned grid: z y x indices grow to the head, the back and the left."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1.0
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing
    affine[:3, 3] = origin_xyz
    return affine


def add_noise(hu_zyx: FloatArray, sigma: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the volume with noise of ``sigma`` HU added, correlated as in filtered back projection.

    In the plane the power falls towards zero frequency (the ramp filter) and towards the highest (the
    kernel's roll-off); neighbouring slices share a part of it.
    """
    frequency = np.hypot(np.fft.fftfreq(hu_zyx.shape[1])[:, None], np.fft.rfftfreq(hu_zyx.shape[2])[None])
    gain = np.sqrt(frequency + 0.01) * np.exp(-((frequency / 0.33) ** 2))
    gain *= sigma / np.sqrt(_mean_power(gain, hu_zyx.shape[2]))
    noisy = np.empty(hu_zyx.shape, np.float32)
    previous = rng.standard_normal(hu_zyx.shape[1:], np.float32)
    for k, hu_yx in enumerate(hu_zyx):
        white = rng.standard_normal(hu_yx.shape, np.float32)
        mixed = np.sqrt(0.8) * white + np.sqrt(0.2) * previous
        previous = white
        noisy[k] = hu_yx + np.fft.irfft2(np.fft.rfft2(mixed) * gain, s=hu_yx.shape)
    return noisy


def _mean_power(gain: NDArray[np.float64], columns: int) -> float:
    """Mean of ``gain`` squared over the whole spectrum, of which ``rfft`` keeps a half."""
    weight = np.full(gain.shape[1], 2.0)
    weight[0] = 1.0
    if columns % 2 == 0:
        weight[-1] = 1.0
    return float((gain**2 * weight).sum() / (gain.shape[0] * columns))


def _meta(who: SeriesIdentity, number: int) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(who.uid(who.study, who.series, number))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return meta


def _empty_ct(who: SeriesIdentity, number: int) -> FileDataset:
    meta = _meta(who, number)
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientID = who.patient
    data.PatientName = f"{who.patient}^Synthetic"
    data.PatientPosition = "HFS"
    data.StudyInstanceUID, data.SeriesInstanceUID = who.uid(who.study), who.uid(who.study, who.series)
    data.FrameOfReferenceUID = who.uid(who.study, "frame")
    data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.StudyDate = data.SeriesDate = data.ContentDate = "20200101"
    data.StudyTime = data.SeriesTime = data.ContentTime = "120000"
    data.Manufacturer, data.BodyPartExamined, data.KVP = "maesil phantom", "CHEST", "120"
    data.SeriesNumber, data.AcquisitionNumber, data.InstanceNumber = who.number, 1, number
    data.SeriesDescription, data.ConvolutionKernel = who.description, who.kernel
    return data


def _decimal(values: ArrayLike) -> list[DSfloat]:
    """DICOM decimal strings: at most 16 characters, rounded where they need be (PS3.5 6.2)."""
    return [DSfloat(float(value), auto_format=True) for value in np.ravel(np.asarray(values, np.float64))]
