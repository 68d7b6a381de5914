"""Encoded pixel data to stored values: what each transfer syntax needs, and what a cut or lying stream is known by.

Decoders are pylibjpeg's (JPEG 2000, HTJ2K, RLE) and CharLS (JPEG-LS) through pydicom, and the one inside SimpleITK
(GDCM) for all other JPEG. Some decoders fill up what is missing from a cut stream: so its end is looked for first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder, pixel_array  # type: ignore[attr-defined]
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from maesil.codes import RefusalCode
from maesil.errors import Refused
from maesil.ingest.streams import JPEG, WAVELET, check_stream, is_lossy_stream
from maesil.ingest.values import numbers_in, tags_of, texts_of, whole_number_of
from maesil.ingest.words import values_of

_LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)
_PLUGIN = {**dict.fromkeys(WAVELET, "pylibjpeg"), RLELossless: "pylibjpeg"}
"""Where pydicom knows several decoders it must always be the same one: another may give other values."""
_PIXEL_TAGS = (
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
_INTENSITIES = ("MONOCHROME1", "MONOCHROME2")
_LOSSY_TAGS = tags_of("LossyImageCompression", "LossyImageCompressionMethod")
_PADDING_TAG = tags_of("PixelPaddingValue")
_FIRST_ITEM = b"\xfe\xff\x00\xe0"
"""How encapsulated pixel data begin (PS3.5 A.4)."""
_OVERLAYS = range(0x6000, 0x601F, 2)
_OVERLAY_BIT_POSITION = 0x0102


@dataclass(frozen=True)
class StoredFrame:
    """The stored values ``[y, x]`` of one frame, and notes on how they were read."""

    stored: NDArray[Any]
    notes: frozenset[str]


def decode_frames(dataset: FileDataset, frames: Sequence[int | None]) -> Iterator[StoredFrame]:
    """Yield the stored values of the frames asked for (None: of the only one)."""
    unsaid = _complete(dataset)
    same_both_ways = 1 << (int(dataset.BitsStored) - 1)
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    notes = frozenset(["lossy"]) if _lossy_before(dataset) else frozenset()
    try:
        if _is_native(dataset, syntax):
            if _is_encapsulated(syntax):
                notes |= {"native_under_compressed_syntax"}
                dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian  # that of all compressed files
            found = _decode_native(dataset, frames)
        else:
            found = _decode_encapsulated(dataset, UID(syntax), frames)
        for decoded in found:
            if unsaid and decoded.stored.max() >= same_both_ways:
                raise Refused("bad_header", "expected PixelRepresentation, found none, and the values depend on it")
            yield StoredFrame(decoded.stored, decoded.notes | notes)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # decoders raise anything; a slice that does not decode costs one volume
        raise Refused(*_failure(syntax, error)) from error


def _lossy_before(dataset: FileDataset) -> bool:
    """Return whether the header says that the pixels went through a lossy encoding at some time."""
    texts = texts_of(dataset, _LOSSY_TAGS)
    return texts["LossyImageCompression"] == "01" or bool(texts["LossyImageCompressionMethod"])


def _complete(dataset: FileDataset) -> bool:
    """Supply what old files leave out and what has one meaning only; each number in its own value representation.

    Return whether the header does not say if values are signed: then only those are known that are the same both ways.
    """
    meaning = texts_of(dataset, tags_of("PhotometricInterpretation"))["PhotometricInterpretation"] or "MONOCHROME2"
    if meaning not in _INTENSITIES:
        raise Refused("colour", "expected MONOCHROME1 or MONOCHROME2, found another: colours or indices of them, no HU")
    dataset.PhotometricInterpretation = meaning
    numbers = {name: whole_number_of(dataset, name) for name in _PIXEL_TAGS}
    if numbers["SamplesPerPixel"] not in (None, 1):
        raise Refused("colour", f"expected one sample a pixel, found {numbers['SamplesPerPixel']}")
    unsaid = numbers["PixelRepresentation"] is None
    otherwise = {"SamplesPerPixel": 1, "PixelRepresentation": 0, "HighBit": (numbers["BitsStored"] or 0) - 1}
    for name, number in numbers.items():
        value = otherwise.get(name) if number is None else number
        if value is None:
            raise Refused("bad_header", f"expected {name}, found none")
        dataset[name] = DataElement(name, dictionary_VR(name), value)
    if not 0 < dataset.BitsStored <= dataset.BitsAllocated:
        text = f"expected at most {dataset.BitsAllocated} bits stored, found {dataset.BitsStored}"
        raise Refused("bad_header", text)
    if dataset.file_meta.get("TransferSyntaxUID") is None:
        # No file meta group at all: plain pixels of exactly the right length can only be what they look like.
        implicit, little = dataset.original_encoding
        if little and _has_native_length(dataset):
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return unsaid


def _native_bytes(dataset: FileDataset) -> int:
    frames = max(1, whole_number_of(dataset, "NumberOfFrames") or 1)
    return int(frames * dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8)


def _has_native_length(dataset: FileDataset) -> bool:
    size = _native_bytes(dataset)
    return len(dataset.PixelData) - size in (0, size % 2)


def _is_native(dataset: FileDataset, syntax: Any) -> bool:
    """Return whether the pixels are not encoded, whatever the transfer syntax says; `Refused` where that is unclear."""
    encapsulated = _is_encapsulated(syntax)
    begins = bytes(dataset.PixelData[:4])
    if encapsulated and begins != _FIRST_ITEM:
        if _has_native_length(dataset):
            return True
        text = "the transfer syntax says that the pixels are encoded, and the pixel data do not begin like that"
        raise Refused("bad_pixels", text)
    if not encapsulated and begins == _FIRST_ITEM and not _has_native_length(dataset):
        text = "the transfer syntax says that the pixels are not encoded, and the pixel data begin as if they were"
        raise Refused("bad_pixels", text)
    return not encapsulated


def _is_encapsulated(syntax: Any) -> bool:
    return syntax is not None and UID(syntax).is_encapsulated


def _decode_native(dataset: FileDataset, frames: Sequence[int | None]) -> Iterator[StoredFrame]:
    expected, found = _native_bytes(dataset), len(dataset.PixelData)
    if found < expected:
        raise Refused("bad_pixels", f"expected {expected} bytes of pixel data, found {found}; the file was cut")
    unused = _unused_low_bits(dataset)
    bits, dataset.BitsStored = int(dataset.BitsStored), dataset.BitsAllocated  # whole words, as they are
    for frame in frames:
        read = _values(dataset, _checked(dataset, pixel_array(dataset, raw=True, index=frame)), bits)
        yield StoredFrame(read.stored >> unused, read.notes)


def _values(dataset: FileDataset, words: NDArray[Any], bits: int) -> StoredFrame:
    padding = numbers_in(texts_of(dataset, _PADDING_TAG)["PixelPaddingValue"], 1)  # of several none can be meant
    one = int(padding[0]) if padding else None
    stored, notes = values_of(words, bits, padding=one, overlay=_has_overlay_in_words(dataset))
    return StoredFrame(stored, notes)


def _has_overlay_in_words(dataset: FileDataset) -> bool:
    """Return whether an overlay plane lies in bits of the words (PS3.3 C.9.2, retired)."""
    positions = [dataset.get(Tag(group, _OVERLAY_BIT_POSITION)) for group in _OVERLAYS]
    return any(position is not None and position.value for position in positions)


def _unused_low_bits(dataset: FileDataset) -> int:
    """Return by how many bits stored values are shifted up in their words; make the data set say that all are used.

    Before 2004 the high bit of 12 could be 15 (PS3.5 8.1.1 has forbidden it since).
    """
    high, stored = int(dataset.HighBit), int(dataset.BitsStored)
    if not stored - 1 < high < int(dataset.BitsAllocated):
        return 0
    dataset.BitsStored = high + 1
    return high + 1 - stored


def _decode_encapsulated(dataset: FileDataset, syntax: UID, frames: Sequence[int | None]) -> Iterator[StoredFrame]:
    count = int(dataset.get("NumberOfFrames") or 1)
    streams = list(generate_frames(dataset.PixelData, number_of_frames=count))
    if len(streams) != count:
        raise Refused("bad_pixels", f"expected {count} encoded frames, found {len(streams)}; the file was cut")
    for frame in frames:
        stream = streams[frame or 0]
        check_stream(syntax, stream, (dataset.Rows, dataset.Columns))
        decode = _decode_with_gdcm if syntax in JPEG else _decode_with_pydicom
        lossy = syntax in _LOSSY or is_lossy_stream(syntax, stream)
        found = _values(dataset, _checked(dataset, decode(dataset, syntax, stream)), int(dataset.BitsStored))
        yield StoredFrame(found.stored, found.notes | (frozenset(["lossy"]) if lossy else frozenset()))


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
    alone = _single_frame(dataset, syntax, stream)
    alone.BitsStored = alone.BitsAllocated  # whole words, as they are
    alone.HighBit = alone.BitsStored - 1
    return pixel_array(alone, raw=True, decoding_plugin=_PLUGIN.get(syntax, ""))


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


def _failure(syntax: Any, error: Exception) -> tuple[RefusalCode, str]:
    if syntax is None:
        return "no_transfer_syntax", "the file does not say how its pixels are encoded"
    try:
        known = UID(syntax)
        if not known.is_encapsulated:
            return "bad_pixels", f"the pixels cannot be read as the header describes them ({type(error).__name__})"
        decoder = get_decoder(known)
    except (NotImplementedError, ValueError):  # how pydicom says that it knows no such syntax, or no decoder for it
        name = UID(syntax).name if UID(syntax).name != syntax else "that the file names"
        return "unknown_transfer_syntax", f"no decoder is known for the transfer syntax {name}"
    if not decoder.is_available and known not in JPEG:
        return "missing_decoder", f"{known.name} needs one of: {'; '.join(decoder.missing_dependencies)}"
    # The texts of decoders hold paths and values of the header: they must not reach the store.
    text = f"the decoder of {known.name} does not take the encoded pixels ({type(error).__name__})"
    return "bad_pixels", f"{text}: they are damaged, or of a kind it does not know"
