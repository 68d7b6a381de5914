"""What an encoded stream says of itself, read before it is decoded: its end, its size, and whether it lost anything.

A transfer syntax may claim more than the stream holds true: near-lossless streams travel under the lossless syntax.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

from maesil.errors import Refused

JPEG = (JPEGLossless, JPEGLosslessSV1, JPEGBaseline8Bit, JPEGExtended12Bit)
WAVELET = (JPEG2000, JPEG2000Lossless, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL)
JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
_END = b"\xff\xd9"
_JPEG_LS_FRAME, _SCAN = 0xF7, 0xDA
_LOSSLESS_FRAMES = (0xC3, 0xC7, 0xCB, 0xCF, _JPEG_LS_FRAME)
"""Frames of predictive coding (ISO 10918-1 table B.1) and of JPEG-LS; all others quantise."""
_NO_FRAME = (0xC4, 0xC8, 0xCC)


def check_stream(syntax: UID, stream: bytes, size: tuple[int, int]) -> None:
    """Raise `Refused` if an encoded frame ends early or is of another size (rows, columns) than the header says."""
    if syntax not in (*WAVELET, *JPEG, *JPEG_LS):
        return
    if not stream.rstrip(b"\0").endswith(_END):
        raise Refused("bad_pixels", "the encoded pixels have no end marker; the file was cut or damaged")
    claimed = _wavelet_size(stream) if syntax in WAVELET else _jpeg_size(stream)
    if claimed != size:
        text = f"expected {size[0]} x {size[1]} pixels, the encoded stream claims {claimed}"
        raise Refused("bad_pixels", text)


def is_lossy_stream(syntax: UID, stream: bytes) -> bool:
    """Return whether an encoded frame says that its pixels are not those that were encoded."""
    if syntax in WAVELET:
        return _is_irreversible(stream)
    if syntax not in (*JPEG, *JPEG_LS):
        return False
    frame = 0
    for marker, segment in _segments(stream):
        if _is_frame(marker):
            frame = marker
        if marker == _SCAN and frame == _JPEG_LS_FRAME and len(segment) >= 3 and segment[-3] > 0:
            return True  # NEAR: how far values may stray (ISO 14495-1 C.2.3)
    return frame not in (0, *_LOSSLESS_FRAMES)


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


def _segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the marker segments of a JPEG or JPEG-LS stream to its first scan (ISO 10918-1 B.1.1)."""
    at = 2
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        yield marker, stream[at + 4 : at + 2 + length]
        if marker == _SCAN:
            return
        at += 2 + length


def _is_frame(marker: int) -> bool:
    return (0xC0 <= marker <= 0xCF and marker not in _NO_FRAME) or marker == _JPEG_LS_FRAME


def _jpeg_size(stream: bytes) -> tuple[int, int] | None:
    """Return rows and columns of a JPEG or JPEG-LS stream (ISO 10918-1 B.2.2, the SOF marker)."""
    for marker, segment in _segments(stream):
        if _is_frame(marker) and len(segment) >= 5:
            return int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    return None
