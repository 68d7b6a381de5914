"""Outside cases: what claims more than it is."""

from __future__ import annotations

import copy
import gzip
import random
import struct
from collections.abc import Callable
from pathlib import Path

from conformance.case import CASES, SCAN, case
from conformance.dicom import compressed, series, set_pixels, stored_of, write, write_all
from conformance.encodings import OTHER, SMALL
from conformance.judge import Expected, expect, refuse
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)


def _bomb(name: str, change: Callable[[Dataset], str | None]) -> None:
    def write_case(folder: Path) -> Expected:
        write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
        slices = series(SMALL)
        syntaxes = [change(ds) for ds in slices]
        for k, (ds, syntax) in enumerate(zip(slices, syntaxes, strict=True)):
            write(ds, folder / f"{k}", syntax or "1.2.840.10008.1.2.1")
        return refuse(beside=(OTHER,))

    CASES[name] = write_case


def _huge_matrix(ds: Dataset) -> None:
    ds.Rows = ds.Columns = 65535


def _rows_zero(ds: Dataset) -> None:
    ds.Rows = 0


def _j2k_claims_more(ds: Dataset) -> str:
    (frame,) = generate_frames(compressed(ds, JPEG2000Lossless).PixelData, number_of_frames=1)
    at = frame.index(b"\xff\x51") + 6
    frame = frame[:at] + struct.pack(">II", 60_000, 60_000) + frame[at + 8 :]
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return JPEG2000Lossless


def _rle_bomb(ds: Dataset) -> str:
    ds.Rows = ds.Columns = 8192
    run = b"\x81\x00" * 262_144
    ds.PixelData = encapsulate([struct.pack("<16I", 2, 64, 64 + len(run), *[0] * 13) + run * 2])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return RLELossless


def _rle_segments_past_the_end(ds: Dataset) -> str:
    ds.PixelData = encapsulate([struct.pack("<16I", 15, *[0xFFFFFF00] * 15) + bytes(100)])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return RLELossless


def _jls_of_noise(ds: Dataset) -> str:
    ds.PixelData = encapsulate([b"\xff\xd8\xff\xf7" + random.Random(1).randbytes(3000)])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return JPEGLSLossless


def _j2k_of_another_size(ds: Dataset) -> str:
    small = copy.deepcopy(ds)
    set_pixels(small, stored_of(ds)[:36, :36])
    ds.PixelData = compressed(small, JPEG2000Lossless).PixelData
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return JPEG2000Lossless


def _two_samples(ds: Dataset) -> None:
    ds.SamplesPerPixel = 2


_bomb("matrix_of_65535", _huge_matrix)
_bomb("matrix_without_rows", _rows_zero)
_bomb("jpeg_2000_claims_60000", _j2k_claims_more)
_bomb("rle_of_zeros_8192_wide", _rle_bomb)
_bomb("rle_segments_past_the_end", _rle_segments_past_the_end)
_bomb("jpeg_ls_of_noise", _jls_of_noise)
_bomb("jpeg_2000_of_another_size", _j2k_of_another_size)
_bomb("two_samples_a_pixel", _two_samples)


@case
def deflated_bomb(folder: Path) -> Expected:
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    ds = series(SCAN)[0]
    ds.PixelData = ds.PixelData + bytes(150_000_000)
    write(ds, folder / "bomb", DeflatedExplicitVRLittleEndian)
    return expect(OTHER)


@case
def element_that_claims_four_gigabytes(folder: Path) -> Expected:
    write_all(series(OTHER, name="b", patient="Poe^Eve"), folder / "clean")
    for path in write_all(series(SMALL), folder):
        data = path.read_bytes()
        at = data.rindex(b"\xe0\x7f\x10\x00OW") + 8
        path.write_bytes(data[:at] + b"\xf0\xff\xff\xff" + data[at + 4 :])
    return refuse(beside=(OTHER,))


@case
def gzip_bomb_named_nifti(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "clean")
    (folder / "bomb.nii.gz").write_bytes(gzip.compress(bytes(150_000_000), 1))
    (folder / "twice.nii.gz").write_bytes(gzip.compress(gzip.compress(bytes(60_000_000), 1), 1))
    return expect(SCAN, or_refused=True)
