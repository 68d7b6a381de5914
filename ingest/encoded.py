"""Encoded pixel data to stored values: what each transfer syntax needs, and what a cut or lying stream is known by.

Decoders are pylibjpeg's (JPEG 2000, HTJ2K, RLE) and CharLS (JPEG-LS) through pydicom, and the one inside SimpleITK
(GDCM) for all other JPEG. Some decoders fill up what is missing from a cut stream: so its end is looked for first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from maesil.errors import Refused

_GDCM = (JPEGLossless, JPEGLosslessSV1, JPEGBaseline8Bit, JPEGExtended12Bit)
_WAVELET = (JPEG2000, JPEG2000Lossless, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL)
_JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
_LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)
_PLUGIN = {**dict.fromkeys(_WAVELET, "pylibjpeg"), RLELossless: "pylibjpeg"}
"""Where pydicom knows several decoders it must always be the same one: another may give other values."""
_PIXEL_TAGS = (
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
_INTENSITIES = ("MONOCHROME1", "MONOCHROME2")
_STREAM_END = b"\xff\xd9"


def decode_frames(dataset: FileDataset, frames: Sequence[int | None]) -> Iterator[NDArray[Any]]:
    """Yield the stored values ``[y, x]`` of the frames asked for (None: of the only one)."""
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        raise Refused("colour", f"expected one sample a pixel, found {dataset.SamplesPerPixel}")
    _complete(dataset)
    if (meaning := str(dataset.PhotometricInterpretation or "MONOCHROME2").strip()) not in _INTENSITIES:
        raise Refused("colour", f"expected MONOCHROME1 or MONOCHROME2, found {meaning}: indices of colours, not HU")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    try:
        if syntax is not None and UID(syntax).is_encapsulated:
            yield from _decode_encapsulated(dataset, UID(syntax), frames)
            return
        unused = _unused_low_bits(dataset)
        for frame in frames:
            yield _checked(dataset, pixel_array(dataset, raw=True, index=frame)) >> unused
    except (Refused, MemoryError):
        raise
    except Exception as error:  # decoders raise anything; a slice that does not decode costs one volume
        raise Refused(*_failure(syntax, error)) from error


def is_lossy(dataset: Dataset) -> bool:
    """Return whether pixels went through a lossy encoding: the header says so, or their stream did when decoded."""
    return str(dataset.get("LossyImageCompression") or "00") == "01"


def _complete(dataset: FileDataset) -> None:
    """Supply what old files leave out and what has one meaning only."""
    if "PhotometricInterpretation" not in dataset:
        dataset.PhotometricInterpretation = "MONOCHROME2"
    if "SamplesPerPixel" not in dataset:
        dataset.SamplesPerPixel = 1
    if dataset.file_meta.get("TransferSyntaxUID") is None:
        # No file meta group at all: plain pixels of exactly the right length can only be what they look like.
        implicit, little = dataset.original_encoding
        size = int(dataset.Rows) * int(dataset.Columns) * int(dataset.BitsAllocated) // 8
        if little and len(dataset.PixelData) - size in (0, size % 2):
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian


def _unused_low_bits(dataset: FileDataset) -> int:
    """Return by how many bits stored values are shifted up in their words; make the data set say that all are used.

    Before 2004 the high bit of 12 could be 15 (PS3.5 8.1.1 has forbidden it since).
    """
    high, stored = int(dataset.get("HighBit") or 0), int(dataset.BitsStored)
    if not stored - 1 < high < int(dataset.BitsAllocated):
        return 0
    dataset.BitsStored = high + 1
    return high + 1 - stored


def _decode_encapsulated(dataset: FileDataset, syntax: UID, frames: Sequence[int | None]) -> Iterator[NDArray[Any]]:
    count = int(dataset.get("NumberOfFrames") or 1)
    streams = list(generate_frames(dataset.PixelData, number_of_frames=count))
    if len(streams) != count:
        raise Refused("bad_pixels", f"expected {count} encoded frames, found {len(streams)}; the file was cut")
    for frame in frames:
        stream = streams[frame or 0]
        _check_stream(dataset, syntax, stream)
        if syntax in _LOSSY or (syntax in _WAVELET and _is_irreversible(stream)):
            dataset.LossyImageCompression = "01"
        decode = _decode_with_gdcm if syntax in _GDCM else _decode_with_pydicom
        yield _checked(dataset, decode(dataset, syntax, stream))


def _checked(dataset: FileDataset, stored: Any) -> NDArray[Any]:
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise Refused("bad_pixels", f"expected {dataset.Rows} x {dataset.Columns} pixels, decoded {stored.shape}")
    return np.asarray(stored)


def _single_frame(dataset: FileDataset, syntax: UID, stream: bytes) -> FileDataset:
    """Return one encoded frame as an object of its own, without a rescale that a decoder might apply."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["one frame"])
    meta.TransferSyntaxUID = syntax
    alone = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    alone.SOPClassUID, alone.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    alone.Modality, alone.PhotometricInterpretation = "OT", "MONOCHROME2"
    for tag in _PIXEL_TAGS:
        setattr(alone, tag, dataset.get(tag))
    alone.PixelData = encapsulate([stream])
    alone["PixelData"].VR = "OB"
    return alone


def _decode_with_pydicom(dataset: FileDataset, syntax: UID, stream: bytes) -> Any:
    return pixel_array(_single_frame(dataset, syntax, stream), raw=True, decoding_plugin=_PLUGIN.get(syntax, ""))


def _decode_with_gdcm(dataset: FileDataset, syntax: UID, stream: bytes) -> Any:
    buffer = BytesIO()
    _single_frame(dataset, syntax, stream).save_as(buffer, enforce_file_format=True)
    descriptor = os.memfd_create("frame")
    try:
        os.write(descriptor, buffer.getbuffer())
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(f"/proc/self/fd/{descriptor}")
        image = reader.Execute()
    finally:
        os.close(descriptor)
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise Refused("colour", "expected one sample a pixel, found several")
    return sitk.GetArrayFromImage(image).reshape(image.GetSize()[1::-1])


def _check_stream(dataset: FileDataset, syntax: UID, stream: bytes) -> None:
    """Raise `Refused` if an encoded frame ends early or is of another size than the header says: before decoding."""
    if syntax in (*_WAVELET, *_GDCM, *_JPEG_LS):
        if not stream.rstrip(b"\0").endswith(_STREAM_END):
            raise Refused("bad_pixels", "the encoded pixels have no end marker; the file was cut or damaged")
        size = _wavelet_size(stream) if syntax in _WAVELET else _jpeg_size(stream)
        if size != (dataset.Rows, dataset.Columns):
            text = f"expected {dataset.Rows} x {dataset.Columns} pixels, the encoded stream claims {size}"
            raise Refused("bad_pixels", text)


def _wavelet_size(stream: bytes) -> tuple[int, int] | None:
    """Return rows and columns of a JPEG 2000 codestream (ISO 15444-1 A.5.1, the SIZ marker)."""
    at = stream.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(stream) < at + 24:
        return None
    width, height, left, top = (int.from_bytes(stream[at + 8 + 4 * n : at + 12 + 4 * n], "big") for n in range(4))
    return height - top, width - left


def _is_irreversible(stream: bytes) -> bool:
    """Return whether a JPEG 2000 codestream uses the 9-7 wavelet (ISO 15444-1 A.6.1, the COD marker)."""
    at = stream.find(b"\xff\x52", stream.find(b"\xff\x4f\xff\x51") + 4)
    return 0 <= at < len(stream) - 13 and stream[at + 13] == 0


def _jpeg_size(stream: bytes) -> tuple[int, int] | None:
    """Return rows and columns of a JPEG or JPEG-LS stream (ISO 10918-1 B.2.2, the SOF marker)."""
    at = 2
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return int.from_bytes(stream[at + 5 : at + 7], "big"), int.from_bytes(stream[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None


def _failure(syntax: Any, error: Exception) -> tuple[str, str]:
    if syntax is None:
        return "no_transfer_syntax", "the file does not say how its pixels are encoded"
    if syntax in _GDCM:  # SimpleITK's messages hold the path
        return "bad_pixels", "the pixel data cannot be decoded; the file was cut or damaged"
    try:
        decoder = get_decoder(UID(syntax))
    except NotImplementedError:  # how pydicom says that it knows no decoder for a syntax
        return "unknown_transfer_syntax", f"no decoder is known for transfer syntax {syntax}"
    if not decoder.is_available:
        return "missing_decoder", f"{UID(syntax).name} needs one of: {'; '.join(decoder.missing_dependencies)}"
    first_line = f"{type(error).__name__}: {error}".splitlines()[0]
    return "bad_pixels", f"the pixel data cannot be decoded ({first_line}); the file was cut or damaged"
