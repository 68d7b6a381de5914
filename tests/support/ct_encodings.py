"""Hard DICOM inputs: intensities, transfer syntaxes and multi-frame objects (see `support.ct_cases`)."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from support.ct_cases import case, refused, series, stored_of
from support.ct_phantom import SHAPE, base_affine, sample

from maesil.synthetic.dicom import save_all, set_pixels

ENCODED_FRAMES = Path(__file__).with_name("encoded_frames.npz")
"""The clean series' frames in encodings that no encoder at hand writes: see `write_encoded_frames`."""

# Intensities ---------------------------------------------------------------------------------------


@case()
def intercept_differs(folder: Path, who: str) -> None:
    slices = series(who)
    for k, data in enumerate(slices):
        set_pixels(data, (stored_of(data) + np.int16(13 * k)).astype(np.int16))
        data.RescaleIntercept = -1024 - 13 * k
    save_all(folder, slices)


@case(max_error=0.69)
def slope_037(folder: Path, who: str) -> None:
    save_all(folder, series(who, rescale=(0.37, -1024.0)))


@case(max_error=2.3, mean_error=0.8)
def slope_differs(folder: Path, who: str) -> None:
    slices = series(who)
    for k, data in enumerate(slices):
        slope, intercept = 1.0 + 0.0625 * k, -1024.0 - 0.25 * k
        hu = stored_of(data) - 1024.0
        set_pixels(data, np.rint((hu - intercept) / slope).astype(np.int16))
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
    save_all(folder, slices)


@case()
def no_rescale_values_in_hu(folder: Path, who: str) -> None:
    slices = series(who, rescale=(1.0, 0.0))
    for data in slices:
        del data.RescaleSlope, data.RescaleIntercept, data.RescaleType
    save_all(folder, slices)


@refused()
def no_rescale_values_plus_1024(folder: Path, who: str) -> None:
    slices = series(who, rescale=(1.0, -1024.0))
    for data in slices:
        del data.RescaleSlope, data.RescaleIntercept, data.RescaleType
    save_all(folder, slices)


@refused()
def rescaled_twice(folder: Path, who: str) -> None:
    save_all(folder, series(who, hu=sample(base_affine()) - 1024.0))


@refused()
def windowed_to_8_bit(folder: Path, who: str) -> None:
    grey = np.clip((sample(base_affine()) + 160.0) / 400.0, 0.0, 1.0) * 255.0
    save_all(folder, series(who, hu=grey, rescale=(1.0, 0.0)))


@refused()
def zero_to_one(folder: Path, who: str) -> None:
    share = np.clip((sample(base_affine()) + 1000.0) / 2200.0, 0.0, 1.0)
    save_all(folder, series(who, hu=share, rescale=(1.0 / 4096.0, 0.0)))


@refused()
def constant(folder: Path, who: str) -> None:
    save_all(folder, series(who, hu=np.full(SHAPE, 37.0)))


def outside_circle() -> np.ndarray:
    """Pixels [y, x] outside the reconstruction circle (an ellipse on the unequal spacing)."""
    y, x = np.indices(SHAPE[1:])
    return ((y - 19.5) / 20.0) ** 2 + ((x - 23.5) / 24.0) ** 2 > 1.0


@case()
def padding_value(folder: Path, who: str) -> None:
    slices = series(who, rescale=(1.0, 0.0), padding=-2000)
    for data in slices:
        set_pixels(data, np.where(outside_circle(), np.int16(-2000), stored_of(data)))
    save_all(folder, slices)


@case()
def padding_value_not_declared(folder: Path, who: str) -> None:
    slices = series(who, rescale=(1.0, -1024.0))
    for data in slices:
        set_pixels(data, np.where(outside_circle(), np.int16(-2000), stored_of(data)))
    save_all(folder, slices)


@case()
def monochrome1(folder: Path, who: str) -> None:
    save_all(folder, series(who, extra={"PhotometricInterpretation": "MONOCHROME1"}))


@case()
def negative_slope(folder: Path, who: str) -> None:
    save_all(folder, series(who, rescale=(-1.0, 1200.0), extra={"PhotometricInterpretation": "MONOCHROME1"}))


@case()
def mixed_signedness(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices[::2]:
        set_pixels(data, stored_of(data).astype(np.uint16))
    save_all(folder, slices)


@case()
def signed_12_bits(folder: Path, who: str) -> None:
    slices = series(who, rescale=(1.0, 0.0))
    for data in slices:
        set_pixels(data, (stored_of(data).astype(np.uint16) & 0xFFF))
        data.BitsStored, data.HighBit, data.PixelRepresentation = 12, 11, 1
    save_all(folder, slices)


@case()
def overlay_in_the_high_bits(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        set_pixels(data, (stored_of(data).astype(np.uint16) & 0xFFF) | 0x4000)
        data.BitsStored, data.HighBit = 12, 11
    save_all(folder, slices)


# Transfer syntaxes ---------------------------------------------------------------------------------


def _compressed(folder: Path, slices: list[FileDataset], syntax: str, **options) -> None:
    for data in slices:
        data.compress(syntax, generate_instance_uid=False, **options)
    save_all(folder, slices)


@case()
def rle(folder: Path, who: str) -> None:
    _compressed(folder, series(who), RLELossless)


@case()
def jpeg_ls(folder: Path, who: str) -> None:
    _compressed(folder, series(who), JPEGLSLossless)


@case()
def jpeg_2000(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        set_pixels(data, stored_of(data).astype(np.uint16))
    _compressed(folder, slices, JPEG2000Lossless)


@case()
def jpeg_2000_signed(folder: Path, who: str) -> None:
    _compressed(folder, series(who, rescale=(1.0, 0.0)), JPEG2000Lossless)


@case(max_error=3.51, mean_error=2.0)
def jpeg_ls_lossy(folder: Path, who: str) -> None:
    slices = series(who, extra={"LossyImageCompression": "01"})
    _compressed(folder, slices, JPEGLSNearLossless, jls_error=3)


@case(max_error=3.51, mean_error=2.0)
def jpeg_ls_lossy_without_the_tag(folder: Path, who: str) -> None:
    _compressed(folder, series(who), JPEGLSNearLossless, jls_error=3)


@case()
def deflated(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    save_all(folder, slices)


@case()
def big_endian(folder: Path, who: str) -> None:
    slices = []
    for little in series(who):
        data = Dataset()  # one that does not remember having been little endian, which would forbid big
        data.update(little)
        data.file_meta = little.file_meta
        data.PixelData = stored_of(little).astype(">i2").tobytes()
        data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        slices.append(data)
    save_all(folder, slices)


@case()
def implicit_vr(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    save_all(folder, slices)


def _with_frames(folder: Path, who: str, encoding: str, syntax: str) -> None:
    slices = series(who)
    with np.load(ENCODED_FRAMES) as encoded:
        ends = np.cumsum(encoded[encoding + "_lengths"])
        frames = [part.tobytes() for part in np.split(encoded[encoding], ends[:-1])]
    for data, frame in zip(slices, frames, strict=True):
        set_pixels(data, stored_of(data).astype(np.uint16))
        data.PixelData = encapsulate([frame])
        data.file_meta.TransferSyntaxUID = syntax
    save_all(folder, slices)


@case()
def htj2k(folder: Path, who: str) -> None:
    _with_frames(folder, who, "htj2k", HTJ2KLossless)


@case()
def jpeg_lossless(folder: Path, who: str) -> None:
    _with_frames(folder, who, "jpeg_lossless", JPEGLosslessSV1)


def write_encoded_frames() -> None:
    """Encode the clean series' frames anew, after a change of the phantom (needs imagecodecs 2026.3)."""
    import imagecodecs

    encoded = {}
    for name, encode in (
        ("htj2k", lambda frame: imagecodecs.htj2k_encode(frame, reversible=True)),
        ("jpeg_lossless", imagecodecs.ljpeg_encode),
    ):
        frames = [encode(stored_of(data).astype(np.uint16)) for data in series("any")]
        encoded[name] = np.frombuffer(b"".join(frames), np.uint8)
        encoded[name + "_lengths"] = np.array([len(frame) for frame in frames])
    np.savez_compressed(ENCODED_FRAMES, **encoded)


# Multi-frame ---------------------------------------------------------------------------------------


def enhanced_ct(who: str, order: list[int]) -> FileDataset:
    """An Enhanced CT object of the clean series whose frames are the slices in ``order`` (PS3.3 A.38)."""
    slices = series(who)
    data = deepcopy(slices[0])
    plane = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
    for keyword in (*plane, "InstanceNumber", "RescaleSlope", "RescaleIntercept", "RescaleType"):
        delattr(data, keyword)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.NumberOfFrames = len(order)
    data.PixelData = b"".join(slices[k].PixelData for k in order)
    shared, first = Dataset(), slices[0]
    measures = {"PixelSpacing": first.PixelSpacing, "SliceThickness": first.SliceThickness}
    shared.PixelMeasuresSequence = _item(**measures)
    shared.PlaneOrientationSequence = _item(ImageOrientationPatient=first.ImageOrientationPatient)
    rescale = {"RescaleSlope": "1", "RescaleIntercept": "-1024", "RescaleType": "HU"}
    shared.PixelValueTransformationSequence = _item(**rescale)
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for number, k in enumerate(order):
        frame = Dataset()
        frame.PlanePositionSequence = _item(ImagePositionPatient=slices[k].ImagePositionPatient)
        frame.FrameContentSequence = _item(FrameAcquisitionNumber=1, InStackPositionNumber=number + 1)
        frames.append(frame)
    data.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return data


def _item(**values) -> Sequence:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return Sequence([item])


@case(used=1)
def enhanced(folder: Path, who: str) -> None:
    save_all(folder, [enhanced_ct(who, list(range(24)))])


@case(used=1)
def enhanced_frames_shuffled(folder: Path, who: str) -> None:
    order = np.random.default_rng(2).permutation(24).tolist()
    save_all(folder, [enhanced_ct(who, order)])


@refused()
def enhanced_frame_missing(folder: Path, who: str) -> None:
    save_all(folder, [enhanced_ct(who, [k for k in range(24) if k != 9])])
