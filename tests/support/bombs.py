"""Files that are small and claim, or unpack to, far more than any CT."""

from __future__ import annotations

import gzip
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from support.ct_cases import save_all, series

FRAME_OF_OTHERS = 12
"""Which slice of the series is the bomb: the others are as they should be."""


def jpeg_2000_claims_60000_squared(folder: Path) -> None:
    """984 bytes whose header says 60000 x 60000, in an object that says 40 x 48."""
    slices = series("bomb-j2k")
    size = struct.pack(">HHIIIIIIIIH", 41, 0, 60000, 60000, 0, 0, 60000, 60000, 0, 0, 1) + b"\x0f\x01\x01"
    stream = b"\xff\x4f\xff\x51" + size
    stream += b"\xff\x52\x00\x0c\x00\x00\x00\x01\x00\x05\x04\x04\x00\x01" + b"\xff\x5c\x00\x13" + bytes(17)
    stream += b"\xff\x90\x00\x0a\x00\x00" + struct.pack(">I", 880) + b"\x00\x01\xff\x93"
    data = slices[FRAME_OF_OTHERS]
    data.PixelData = encapsulate([stream.ljust(982, b"\0") + b"\xff\xd9"])
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = JPEG2000Lossless
    save_all(folder, slices)


def rle_to_a_gigabyte(folder: Path) -> None:
    """Two segments of 8 MB, each of which repeats a byte 128 times for every two: 1 GB for 40 x 48 pixels."""
    slices = series("bomb-rle")
    segment = b"\x81\x07" * (4 << 20)
    header = struct.pack("<16I", 2, 64, 64 + len(segment), *[0] * 13)
    data = slices[FRAME_OF_OTHERS]
    data.PixelData = encapsulate([header + segment + segment])
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = RLELossless
    save_all(folder, slices)


def deflated_to_two_gigabytes(folder: Path) -> None:
    """About 2 MB that inflate to an object with 2 GB of pixel data."""
    paths = save_all(folder, series("bomb-deflated"))
    path = paths[FRAME_OF_OTHERS]
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.PixelData = b"\1\2"
    buffer = BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    whole = buffer.getvalue()
    meta = 144 + int.from_bytes(whole[140:144], "little")
    plain = zlib.decompress(whole[meta:], -zlib.MAX_WBITS)
    head = plain[: plain.index(b"\xe0\x7f\x10\x00") + 8]
    size, block = 1 << 31, bytes(1 << 24)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    parts = [whole[:meta], packer.compress(head + struct.pack("<I", size))]
    parts += [packer.compress(block) for _ in range(size // len(block))]
    path.write_bytes(b"".join([*parts, packer.flush()]))


def rows_and_columns_of_65535(folder: Path) -> None:
    slices = series("bomb-rows")
    for data in slices:
        data.Rows = data.Columns = 65535
    save_all(folder, slices)


def nifti_of_zeros(folder: Path) -> None:
    """A gzip of zeros that claims to be 1000^3 float64 voxels."""
    head = bytearray(352)
    head[:4] = np.int32(348).tobytes()
    head[40:56] = np.array([3, 1000, 1000, 1000, 1, 1, 1, 1], "<i2").tobytes()
    head[70:74] = np.array([64, 64], "<i2").tobytes()
    head[108:112] = np.float32(352).tobytes()
    head[344:348] = b"n+1\0"
    folder.mkdir(parents=True, exist_ok=True)
    body = gzip.compress(bytes(1 << 24), 9)
    (folder / "zeros.nii.gz").write_bytes(gzip.compress(bytes(head)) + body * 478)


BOMBS = (
    jpeg_2000_claims_60000_squared,
    rle_to_a_gigabyte,
    deflated_to_two_gigabytes,
    rows_and_columns_of_65535,
    nifti_of_zeros,
)
