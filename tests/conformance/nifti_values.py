"""Outside cases of NIfTI: files that are packed or damaged, and images that are no CT."""

from __future__ import annotations

import bz2
import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conformance.case import CASES, SCAN
from conformance.judge import Expected, expect, refuse
from conformance.nifti import HU, case, image, save, simple
from numpy.typing import NDArray


def _packed(name: str, pack: Callable[[bytes], bytes], expected: Expected, file: str = "ct.nii.gz") -> None:
    def write_case(folder: Path) -> Expected:
        raw = save(image(), folder / "ct.nii").read_bytes()
        (folder / "ct.nii").unlink()
        (folder / file).write_bytes(pack(raw))
        return expected

    CASES[f"nifti_{name}"] = write_case


def _flip(data: bytes, at: int) -> bytes:
    bent = bytearray(data)
    bent[at] ^= 0x10
    return bytes(bent)


_packed(
    "gzip_of_several_members",
    lambda raw: b"".join(gzip.compress(raw[i : i + 20_000]) for i in range(0, len(raw), 20_000)),
    expect(SCAN),
)
_packed("gzip_with_a_file_name_and_comment", lambda raw: _named_gzip(raw), expect(SCAN))
_packed(
    "garbage_behind_the_gzip",
    lambda raw: gzip.compress(raw) + b"garbage behind the end" * 9,
    expect(SCAN, or_refused=True),
)
_packed("zeros_behind_the_gzip", lambda raw: gzip.compress(raw) + bytes(512), expect(SCAN))
_packed("bytes_behind_the_voxels", lambda raw: gzip.compress(raw + b"tail" * 100), expect(SCAN, or_refused=True))
_packed("gzip_cut_in_the_trailer", lambda raw: gzip.compress(raw)[:-4], refuse())
_packed("gzip_cut_at_half", lambda raw: gzip.compress(raw)[: len(gzip.compress(raw)) // 2], refuse())
_packed("gzip_checksum_flipped", lambda raw: _flip(gzip.compress(raw), -6), refuse())
_packed("gzip_length_flipped", lambda raw: _flip(gzip.compress(raw), -2), refuse())
_packed("gzip_stored_with_a_flipped_voxel", lambda raw: _flip(gzip.compress(raw, 0), 40_000), refuse())
_packed("raw_cut_by_a_byte", lambda raw: raw[:-1], refuse(), "ct.nii")
_packed("raw_cut_in_the_header", lambda raw: raw[:340], refuse(or_refused=True), "ct.nii")
_packed("not_compressed_named_gz", lambda raw: raw, expect(SCAN))
_packed("compressed_not_named_so", lambda raw: gzip.compress(raw), expect(SCAN), "ct.nii")
_packed("no_name_to_speak_of", lambda raw: gzip.compress(raw), expect(SCAN), "0001")
_packed("bzip2", lambda raw: bz2.compress(raw), expect(counted={"not_medical": 1}, or_refused=True), "ct.nii.bz2")
_packed("gzip_twice", lambda raw: gzip.compress(gzip.compress(raw)), expect(SCAN, or_refused=True))
_packed("html", lambda raw: b"<html>404</html>", refuse(or_refused=True))


def _named_gzip(raw: bytes) -> bytes:
    packed = gzip.compress(raw, mtime=1)
    return packed[:3] + bytes([0x18]) + packed[4:10] + b"Roe^Ada.nii\0a comment\0" + packed[10:]


@case
def in_a_zip_gzipped_and_plain(folder: Path) -> Expected:
    other = SCAN.but(enhancement=66)
    raw = save(image(), folder / "ct.nii").read_bytes()
    second = save(image(other), folder / "ct.nii.gz").read_bytes()
    for path in list(folder.iterdir()):
        path.unlink()
    with zipfile.ZipFile(folder / "both.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/ct.nii", raw)
        archive.writestr("b/ct.nii.gz", second)
        archive.writestr("__MACOSX/._ct.nii", b"\0\5\x16\7")
    return expect(SCAN, other)


@case
def two_subjects_of_one_file_name(folder: Path) -> Expected:
    other = SCAN.but(enhancement=66)
    save(image(), folder / "s1" / "ct.nii.gz")
    save(image(other), folder / "s2" / "ct.nii.gz")
    return expect(SCAN, other)


@case
def same_scan_as_int16_and_float32_and_flipped(folder: Path) -> Expected:
    save(image(), folder / "a.nii.gz")
    save(image(dtype=np.float32), folder / "b.nii")
    flipped = SCAN.but(along=(-4.6, 0, 0))
    save(image(flipped), folder / "c.nii")
    return expect(SCAN, flipped, counted={"duplicate_volume": 1}, duplicates=1)


def _numbers(
    name: str, function: Callable[[NDArray[Any]], NDArray[Any]], expected: Expected, dtype: Any = np.float32
) -> None:
    simple(name, lambda: image(data=function(HU.astype(np.float64)), dtype=dtype), expected)


_numbers("scaled_0_to_1", lambda hu: (hu + 1000) / 2000, refuse())
_numbers("scaled_minus_1_to_1", lambda hu: hu / 1000, refuse())
_numbers("scaled_0_to_255", lambda hu: (hu.clip(-200, 300) + 200) * 255 / 500, refuse(), np.uint8)
_numbers("z_scores", lambda hu: (hu - hu.mean()) / hu.std(), refuse())
_numbers("plus_1024", lambda hu: hu + 1024, refuse("offset_1024"), np.uint16)
_numbers("plus_1000", lambda hu: hu + 1000, refuse(), np.int16)
_numbers("minus_1024", lambda hu: hu - 1024, refuse(), np.int16)
_numbers("times_ten", lambda hu: hu * 10, refuse(), np.int16)
_numbers("windowed_200_300", lambda hu: hu.clip(-200, 300), refuse(), np.int16)
_numbers("windowed_minus_160_to_240", lambda hu: hu.clip(-160, 240), refuse(), np.int16)
_numbers(
    "clipped_minus_1000_to_400",
    lambda hu: hu.clip(-1000, 400),
    expect(SCAN.but(tolerance=80), or_refused=True),
    np.int16,
)
_numbers("negated", lambda hu: -hu, refuse(), np.int16)
_numbers("mask", lambda hu: hu > -500, refuse(), np.uint8)
_numbers("mask_of_255", lambda hu: (hu > -500) * 255, refuse(), np.uint8)
_numbers("labels_to_117", lambda hu: np.digitize(hu, np.linspace(-900, 400, 117)), refuse(), np.uint8)
_numbers("labels_int16", lambda hu: np.digitize(hu, [-500, -60, 30, 70, 200]), refuse(), np.int16)
_numbers("probability_map", lambda hu: 1 / (1 + np.exp(-hu / 100)), refuse())
_numbers("pet_suv", lambda hu: np.where(hu > -500, 1.2 + np.abs(hu) / 90, 0.02), refuse())
_numbers("mr_like", lambda hu: np.where(hu > -500, 300 + 2.2 * hu.clip(-150, 200), 8).clip(0), refuse(), np.int16)
_numbers(
    "mr_like_0_to_4000", lambda hu: np.where(hu > -500, 1300 + 9 * hu.clip(-140, 250), 20).clip(0), refuse(), np.int16
)
_numbers("ultrasound_like", lambda hu: np.random.default_rng(2).rayleigh(40, hu.shape).clip(0, 255), refuse(), np.uint8)
_numbers("dose_in_gray", lambda hu: 70 * np.exp(-np.abs(hu - 40) / 300), refuse())
_numbers("hu_of_a_cropped_organ_on_zero", lambda hu: np.where(np.abs(hu - 60) < 60, hu, 0), refuse(), np.int16)
_numbers("background_zero_not_air", lambda hu: np.where(hu > -700, hu, 0), refuse(), np.int16)
_numbers("body_on_minus_1024", lambda hu: np.where(hu > -950, hu, -1024), expect(SCAN.but(tolerance=80)), np.int16)


@case
def background_minus_3024_in_the_corners(folder: Path) -> Expected:
    outside = np.zeros(SCAN.shape, bool)
    outside[:, :4], outside[:, :, :5] = True, True
    save(image(data=np.where(outside.transpose(2, 1, 0), -3024, HU)), folder / "ct.nii.gz")
    return expect(SCAN, invalid=outside, notes=("undeclared_padding",))


@case
def one_percent_nan(folder: Path) -> Expected:
    gone = np.random.default_rng(4).random(SCAN.shape) < 0.01
    data = np.where(gone, np.nan, SCAN.values()).transpose(2, 1, 0)
    save(image(data=data, dtype=np.float32), folder / "ct.nii.gz")
    return expect(SCAN, invalid=gone, or_refused=True)


@case
def corners_nan_and_inf(folder: Path) -> Expected:
    gone = np.zeros(SCAN.shape, bool)
    gone[:, :2, :2] = True
    data = np.where(gone, np.nan, SCAN.values()).transpose(2, 1, 0)
    data[0, 0, :5], data[1, 0, :5] = np.inf, -np.inf
    save(image(data=data, dtype=np.float32), folder / "ct.nii.gz")
    return expect(SCAN, invalid=gone, notes=("non_finite_voxels",))


_numbers(
    "sixty_percent_nan",
    lambda hu: np.where(np.random.default_rng(4).random(hu.shape) < 0.6, np.nan, hu),
    refuse("non_finite"),
)
_numbers("all_nan", lambda hu: hu * np.nan, refuse())


@case
def values_of_1e30_in_one_voxel(folder: Path) -> Expected:
    gone = np.zeros(SCAN.shape, bool)
    gone[13, 20, 24] = True
    save(image(data=np.where(gone, 1e30, SCAN.values()).transpose(2, 1, 0), dtype=np.float32), folder / "ct.nii.gz")
    return expect(SCAN, invalid=gone, or_refused=True)


@case
def two_passes_half_a_step_apart(folder: Path) -> Expected:
    late = SCAN.but(enhancement=160, middle=(3, -2, 6.75))
    woven = np.empty((52, 40, 48), np.int32)
    woven[::2], woven[1::2] = SCAN.values(), late.values()
    fine = SCAN.but(shape=(52, 40, 48), step=(0, 0, 2.75), middle=(3, -2, 5.375))
    save(image(fine, data=woven.transpose(2, 1, 0)), folder / "ct.nii.gz")
    return refuse()


@case
def labels_beside_the_ct(folder: Path) -> Expected:
    save(image(), folder / "imagesTr" / "ct.nii.gz")
    save(image(data=np.digitize(HU, [-500, -60, 30, 70, 200]), dtype=np.uint8), folder / "labelsTr" / "ct.nii.gz")
    save(image(data=(HU > 200), dtype=np.float32), folder / "labelsTr" / "bone.nii.gz")
    return refuse(beside=(SCAN,))
