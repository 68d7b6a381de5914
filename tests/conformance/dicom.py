"""DICOM slices of the outside phantom: written tag by tag, so that each case can bend any of them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from conformance.phantom import Scan
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

CT, ENHANCED, LEGACY = (f"1.2.840.10008.5.1.4.1.1.2{tail}" for tail in ("", ".1", ".2"))
SC, SC_MULTI = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.7.2"
Series = list[Dataset]


def uid(*words: object) -> str:
    """Return a UID that depends on the words alone, so that a case is the same in every run."""
    return generate_uid(entropy_srcs=[str(word) for word in words])


def series(scan: Scan, name: str = "a", patient: str = "Roe^Ada", number: int = 4, **tags: Any) -> Series:
    """Return one dataset a slice: unsigned 12 bit, intercept -1024, axial. ``tags`` are set on all."""
    hu = scan.values()
    slices = []
    for k in range(scan.shape[0]):
        ds = header(name, patient, number)
        place(ds, scan, k)
        ds.SOPInstanceUID = uid(name, patient, number, k)
        ds.InstanceNumber = k + 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
        set_pixels(ds, hu[k] + 1024)
        for tag, value in tags.items():
            setattr(ds, tag, value)
        slices.append(ds)
    return slices


def header(name: str, patient: str, number: int) -> Dataset:
    """Return what all slices of a series share, geometry and pixels apart."""
    ds = Dataset()
    ds.SOPClassUID, ds.Modality = CT, "CT"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientName, ds.PatientID, ds.PatientSex, ds.PatientBirthDate = patient, f"ID-{patient}", "O", "19440203"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid("study", patient), uid("series", patient, name)
    ds.FrameOfReferenceUID = uid("frame", patient)
    ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.StudyID = "20190405", "101112", "A77", "S1"
    ds.SeriesNumber, ds.AcquisitionNumber, ds.SeriesDescription = number, 2, "Thorax 5.5"
    ds.Manufacturer, ds.KVP, ds.ConvolutionKernel = "Made-up Medical", 120, "B41s"
    ds.SliceThickness, ds.PatientPosition = 5.5, "HFS"
    return ds


def place(ds: Dataset, scan: Scan, k: float) -> None:
    """Put a slice where index ``k`` of the scan lies."""
    along, down = np.asarray(scan.along), np.asarray(scan.down)
    spacing = float(np.linalg.norm(down)), float(np.linalg.norm(along))
    cosines = [*(along / spacing[1]), *(down / spacing[0])]
    ds.ImageOrientationPatient = [ds_string(c) for c in cosines]
    ds.ImagePositionPatient = [ds_string(p) for p in scan.position(k)]
    ds.PixelSpacing = [ds_string(s) for s in spacing]


def ds_string(value: float) -> str:
    """Return a number as a decimal string of at most 16 characters."""
    text = f"{value:.10f}"
    return text[:16].rstrip("0").rstrip(".") if "." in text[:16] else text[:16]


def set_pixels(ds: Dataset, stored: NDArray[Any], bits: int = 12, signed: int = 0, allocated: int = 16) -> None:
    """Set native pixel data and all that describes it."""
    kind = {8: "u1", 16: "u2", 32: "u4"}[allocated]
    ds.Rows, ds.Columns, ds.SamplesPerPixel = *stored.shape[-2:], 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = allocated, bits, bits - 1, signed
    mask = (1 << allocated) - 1
    ds.PixelData = (stored.astype(np.int64) & mask).astype(f"<{kind}").tobytes()
    ds["PixelData"].VR = "OW" if allocated > 8 else "OB"


def stored_of(ds: Dataset) -> NDArray[np.int64]:
    """Return the 16-bit words of native pixel data."""
    kind = "<i2" if ds.PixelRepresentation else "<u2"
    return np.frombuffer(ds.PixelData, kind).reshape(ds.Rows, ds.Columns).astype(np.int64)


def write(ds: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> Path:
    """Write one DICOM file with preamble and file meta information."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ds = copy.copy(ds)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", CT)
    meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", uid(path))
    meta.TransferSyntaxUID = syntax
    ds.file_meta = meta
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    pydicom.dcmwrite(path, ds, enforce_file_format=True, implicit_vr=implicit, little_endian=little)
    return path


def write_all(
    slices: Iterable[Dataset], folder: Path, seed: int = 11, syntax: str = ExplicitVRLittleEndian
) -> list[Path]:
    """Write slices under names that say nothing, in an order that says nothing; return the paths in slice order."""
    slices = list(slices)
    names = random.Random(seed).sample(range(10**6, 10**7), len(slices))
    return [write(ds, folder / f"{name:x}", syntax) for ds, name in zip(slices, names, strict=True)]


def compressed(ds: Dataset, syntax: str, **more: Any) -> Dataset:
    """Return the object with its pixels encoded."""
    file = FileDataset("", copy.deepcopy(ds))
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.compress(syntax, generate_instance_uid=False, **more)
    del file.file_meta
    return file


def each(slices: Series, change: Callable[[Dataset, int], None]) -> Series:
    """Apply a change to every slice and return them."""
    for k, ds in enumerate(slices):
        change(ds, k)
    return slices


def enhanced(
    scan: Scan,
    name: str = "e",
    patient: str = "Roe^Ada",
    rescale: str = "shared",
    order: list[int] | None = None,
    sop_class: str = ENHANCED,
) -> Dataset:
    """Return one multi-frame object; ``rescale`` is ``shared``, or ``frame``: it differs from frame to frame."""
    order = order or list(range(scan.shape[0]))
    ds = header(name, patient, 9)
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, uid(name, patient, "enhanced")
    for tag in ("KVP", "ConvolutionKernel", "SliceThickness"):
        delattr(ds, tag)
    hu = scan.values()
    frames, stored = [], []
    for k in order:
        frames.append(_frame(scan, k))
        slope, intercept = (1, -1024) if rescale == "shared" else (0.5, -1024 - 3 * k)
        stored.append(np.rint((hu[k] - intercept) / slope))
        if rescale == "frame":
            frames[-1].PixelValueTransformationSequence = [_rescale(slope, intercept)]
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    reference = Dataset()
    place(reference, scan, 0)
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = reference.ImageOrientationPatient
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = reference.PixelSpacing
    shared.PixelMeasuresSequence[0].SliceThickness = 5.5
    if rescale == "shared":
        shared.PixelValueTransformationSequence = [_rescale(1, -1024)]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = frames
    ds.NumberOfFrames = len(order)
    set_pixels(ds, np.stack(stored), bits=16)
    return ds


def _frame(scan: Scan, k: int) -> Dataset:
    frame, reference = Dataset(), Dataset()
    place(reference, scan, k)
    frame.PlanePositionSequence = [Dataset()]
    frame.PlanePositionSequence[0].ImagePositionPatient = reference.ImagePositionPatient
    frame.FrameContentSequence = [Dataset()]
    frame.FrameContentSequence[0].StackID, frame.FrameContentSequence[0].InStackPositionNumber = "1", k + 1
    frame.FrameContentSequence[0].FrameAcquisitionNumber = 1
    frame.CTImageFrameTypeSequence = [Dataset()]
    frame.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    return frame


def _rescale(slope: float, intercept: float) -> Dataset:
    item = Dataset()
    item.RescaleSlope, item.RescaleIntercept, item.RescaleType = slope, intercept, "HU"
    return item


def merged(*parts: Dataset) -> Dataset:
    """Return one multi-frame object with the frames of several that share their shared groups."""
    ds = copy.deepcopy(parts[0])
    ds.PerFrameFunctionalGroupsSequence = [frame for part in parts for frame in part.PerFrameFunctionalGroupsSequence]
    ds.NumberOfFrames = len(ds.PerFrameFunctionalGroupsSequence)
    ds.PixelData = b"".join(part.PixelData for part in parts)
    return ds
