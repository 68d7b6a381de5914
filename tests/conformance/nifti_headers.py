"""Outside cases of NIfTI: where voxels lie and how they are stored."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from conformance.case import SCAN
from conformance.judge import Expected, expect, refuse
from conformance.nifti import HU, case, image, ras, save, simple
from conformance.phantom import Scan


@case
def all_48_orientations(folder: Path) -> Expected:
    """One file each, of a body shifted by its own amount, so that no two are the same scan."""
    scans = []
    base = Scan(shape=(20, 28, 32), step=(0, 0, 7.1), down=(0, 7.0, 0), along=(6.7, 0, 0))
    for n, (order, signs) in enumerate(
        itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
    ):
        vectors = [base.step, base.down, base.along]
        shape = [base.shape[a] for a in order]
        turned = [tuple(np.asarray(vectors[a], float) * s) for a, s in zip(order, signs, strict=True)]
        scan = base.but(shape=tuple(shape), step=turned[0], down=turned[1], along=turned[2], enhancement=float(n))
        save(image(scan, qform=n % 3, sform=1 if n % 3 == 0 else n % 2), folder / f"{n % 5}" / f"ct{n}.nii")
        scans.append(scan)
    return expect(*scans)


OBLIQUE = SCAN.turned(-9, 14, 31)
SHEARED = SCAN.but(step=(0.9, -1.1, 5.4), resampled=True, tolerance=90)
simple("oblique_sform_alone", lambda: image(OBLIQUE, qform=0), expect(OBLIQUE))
simple(
    "oblique_qform_alone",
    lambda: image(OBLIQUE.but(along=tuple(-np.asarray(OBLIQUE.along))), sform=0),
    expect(OBLIQUE.but(along=tuple(-np.asarray(OBLIQUE.along)))),
)
simple("sheared_sform", lambda: _sheared(), expect(SHEARED))


def _sheared() -> Any:
    made = image(SCAN, data=SHEARED.values().transpose(2, 1, 0), qform=0)
    made.set_sform(ras(SHEARED), 1)
    return made


def _qfac(value: float) -> Callable[[bytearray], None]:
    return lambda raw: struct.pack_into("<f", raw, 76, value)


LEFT = SCAN.but(along=(-4.6, 0, 0))  # right-handed in RAS as in LPS: qfac +1
simple("qfac_minus_1", lambda: image(SCAN.but(step=(0, 0, -5.5)), sform=0), expect(SCAN.but(step=(0, 0, -5.5))))
simple("qfac_zero_means_one", lambda: image(SCAN, sform=0), expect(SCAN), _qfac(0.0))
simple("sform_code_4_qform_code_1", lambda: image(SCAN, sform=4), expect(SCAN))


def _set(offset: int, fmt: str, *values: Any) -> Callable[[bytearray], None]:
    return lambda raw: struct.pack_into(f"<{fmt}", raw, offset, *values)


simple("sform_all_zero_rows_qform_good", lambda: image(SCAN), expect(SCAN), _set(280, "12f", *[0.0] * 12))
simple(
    "sform_nan_qform_good", lambda: image(SCAN), expect(SCAN, or_refused=True), _set(280, "12f", *[float("nan")] * 12)
)
simple(
    "sform_nan_no_qform", lambda: image(SCAN, qform=0), refuse("no_orientation"), _set(280, "12f", *[float("nan")] * 12)
)
simple("neither_form_but_rows_filled", lambda: image(SCAN, sform=1), refuse("no_orientation"), _set(252, "2h", 0, 0))
simple("qform_shifted_by_3_mm", lambda: image(SCAN), refuse("forms_differ"), lambda raw: _add(raw, 268, 3.0))
simple(
    "qform_shifted_prefer_sform",
    lambda: image(SCAN),
    expect(SCAN, options=("--prefer", "sform")),
    lambda raw: _add(raw, 268, 3.0),
)
simple("qform_shifted_by_a_quarter_mm", lambda: image(SCAN), expect(SCAN), lambda raw: _add(raw, 268, 0.25))
simple("sform_flipped_against_qform", lambda: image(SCAN), refuse("forms_differ"), lambda raw: _negate(raw, 280))
simple("sform_scaled_by_ten", lambda: image(SCAN), refuse("forms_differ"), lambda raw: _scale(raw, 280, 12, 10.0))
simple("pixdim_zero_qform_alone", lambda: image(SCAN, sform=0), refuse(), _set(80, "3f", 0, 0, 0))
simple("pixdim_zero_sform_alone", lambda: image(SCAN, qform=0), expect(SCAN), _set(80, "3f", 0, 0, 0))
simple("pixdim_negative_sform_alone", lambda: image(SCAN, qform=0), expect(SCAN), _set(80, "3f", -4.6, -5.0, -5.5))
simple(
    "quaternion_longer_than_one", lambda: image(SCAN, sform=0), refuse(or_refused=True), _set(256, "3f", 0.9, 0.9, 0.9)
)


def _add(raw: bytearray, offset: int, amount: float) -> None:
    (value,) = struct.unpack_from("<f", raw, offset)
    struct.pack_into("<f", raw, offset, value + amount)


def _negate(raw: bytearray, offset: int) -> None:
    _scale(raw, offset, 4, -1.0)


def _scale(raw: bytearray, offset: int, count: int, factor: float) -> None:
    values = struct.unpack_from(f"<{count}f", raw, offset)
    struct.pack_into(f"<{count}f", raw, offset, *(v * factor for v in values))


def _unit(code: int, factor: float) -> Callable[[bytearray], None]:
    """Geometry in another unit, and the header says so."""

    def change(raw: bytearray) -> None:
        _scale(raw, 80, 3, factor)
        _scale(raw, 268, 3, factor)
        _scale(raw, 280, 12, factor)
        raw[123] = code

    return change


simple("in_metres", lambda: image(SCAN), expect(SCAN.but(tolerance=0.6), notes=("in_meters",)), _unit(1, 1e-3))
simple("in_micrometres", lambda: image(SCAN), expect(SCAN.but(tolerance=0.6), notes=("in_microns",)), _unit(3, 1e3))
simple("unit_unknown", lambda: image(SCAN), expect(SCAN), _set(123, "b", 0))
simple("metres_claimed_but_mm", lambda: image(SCAN), expect(SCAN, or_refused=True), _set(123, "b", 1))
simple("unit_code_that_does_not_exist", lambda: image(SCAN), expect(SCAN, or_refused=True), _set(123, "b", 5))


def _lowered(raw: bytearray, gap: int, fill: bytes = b"\0") -> bytes:
    struct.pack_into("<f", raw, 108, 352.0 + gap)
    return bytes(raw[:352]) + (fill * gap)[:gap] + bytes(raw[352:])


simple("voxels_at_an_odd_offset", lambda: image(SCAN), expect(SCAN), lambda raw: _lowered(raw, 5))
simple("voxels_at_offset_4096", lambda: image(SCAN), expect(SCAN), lambda raw: _lowered(raw, 4096 - 352))
simple("voxel_offset_zero", lambda: image(SCAN), expect(SCAN, or_refused=True), _set(108, "f", 0.0))
simple("voxel_offset_beyond_the_end", lambda: image(SCAN), refuse(), _set(108, "f", 1e30))
simple("voxel_offset_nan", lambda: image(SCAN), refuse(), _set(108, "f", float("nan")))
simple("voxel_offset_negative", lambda: image(SCAN), refuse(or_refused=True), _set(108, "f", -2.0))


def _extension(raw: bytearray) -> bytes:
    text = b"PatientName: Roe^Ada born 19440203".ljust(56, b"\0")
    raw[348] = 1
    struct.pack_into("<f", raw, 108, 352.0 + 64)
    return bytes(raw[:352]) + struct.pack("<2i", 64, 6) + text + bytes(raw[352:])


simple("extension_with_a_patient", lambda: image(SCAN), expect(SCAN, options=("--phi-scan",)), _extension)
simple(
    "extension_of_negative_size", lambda: image(SCAN), expect(SCAN, or_refused=True), lambda raw: _broken_extension(raw)
)


def _broken_extension(raw: bytearray) -> bytes:
    raw[348] = 1
    struct.pack_into("<f", raw, 108, 352.0 + 64)
    return bytes(raw[:352]) + struct.pack("<2i", -64, 6) + bytes(56) + bytes(raw[352:])


simple(
    "uint8_slope_14",
    lambda: image(data=np.rint((HU + 1024) / 14), dtype=np.uint8, slope=14, inter=-1024),
    expect(SCAN.but(tolerance=8)),
)
simple("uint16_inter_minus_1024", lambda: image(data=HU + 1024, dtype=np.uint16, slope=1, inter=-1024), expect(SCAN))
simple("int16_slope_half", lambda: image(data=HU * 2, slope=0.5, inter=0), expect(SCAN))
simple("int16_slope_minus_1", lambda: image(data=-HU, slope=-1, inter=0), expect(SCAN))
simple("int16_slope_nan_inter_nan", lambda: image(), expect(SCAN))
simple("int16_slope_zero_inter_5000", lambda: image(slope=0, inter=5000), expect(SCAN))
simple("int16_slope_inf", lambda: image(slope=float("inf"), inter=0), expect(SCAN, or_refused=True))
simple("int16_slope_good_inter_nan", lambda: image(slope=1, inter=float("nan")), expect(SCAN, or_refused=True))
simple("uint32", lambda: image(data=HU + 1024, dtype=np.uint32, slope=1, inter=-1024), expect(SCAN))
simple("int64", lambda: image(dtype=np.int64), expect(SCAN))
simple(
    "float32_with_fractions",
    lambda: image(data=SCAN.at(SCAN.centres()).transpose(2, 1, 0), dtype=np.float32),
    expect(SCAN),
)
simple(
    "float64_big_endian_nifti_2",
    lambda: image(kind=nibabel.Nifti2Image, dtype=np.float64).as_reoriented([[0, 1], [1, 1], [2, 1]]),
    expect(SCAN),
)
simple("nifti_2_gz", lambda: image(kind=nibabel.Nifti2Image, dtype=np.int32), expect(SCAN), file="ct.nii.gz")
simple(
    "rgb",
    lambda: image(
        data=np.zeros((48, 40, 26), [("R", "u1"), ("G", "u1"), ("B", "u1")]),
        dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")],
    ),
    refuse("bad_dtype"),
)
simple("complex64", lambda: image(dtype=np.complex64), refuse("bad_dtype"))
simple("datatype_that_does_not_exist", lambda: image(), refuse(), _set(70, "h", 777))
simple("bitpix_wrong", lambda: image(), expect(SCAN, or_refused=True), _set(72, "h", 8))
simple("dim_0_of_seven", lambda: image(), expect(SCAN, or_refused=True), _set(40, "8h", 7, 48, 40, 26, 1, 1, 1, 1))
simple("dim_0_of_nine", lambda: image(), refuse(or_refused=True), _set(40, "h", 9))
simple("dim_negative", lambda: image(), refuse(), _set(42, "h", -48))
simple("dims_of_32767", lambda: image(), refuse(), _set(42, "3h", 32767, 32767, 32767))


@case
def big_endian_pair(folder: Path) -> Expected:
    made = image(kind=nibabel.Nifti1Pair)
    header = made.header.as_byteswapped(">")
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Pair(np.asanyarray(made.dataobj), made.affine, header), folder / "ct.hdr")
    return expect(SCAN, counted={"committed": 2})


@case
def gzipped_pair(folder: Path) -> Expected:
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(image(kind=nibabel.Nifti1Pair), folder / "ct.img.gz")
    return expect(SCAN, or_refused=True)


@case
def header_without_its_image(folder: Path) -> Expected:
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(image(kind=nibabel.Nifti1Pair), folder / "ct.hdr")
    (folder / "ct.img").unlink()
    return refuse()


@case
def analyze_without_orientation(folder: Path) -> Expected:
    folder.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.AnalyzeImage(HU.astype(np.int16), None), folder / "ct.hdr")
    return refuse()


@case
def four_dimensions_of_one_volume(folder: Path) -> Expected:
    save(image(data=HU[..., None]), folder / "ct.nii.gz")
    return expect(SCAN)


@case
def five_dimensions_of_one_volume(folder: Path) -> Expected:
    save(image(data=HU[..., None, None]), folder / "ct.nii.gz")
    return expect(SCAN)


@case
def four_dimensions_of_three_volumes(folder: Path) -> Expected:
    scans = [SCAN.but(enhancement=60.0 * n) for n in range(3)]
    save(image(data=np.stack([s.values().transpose(2, 1, 0) for s in scans], axis=-1)), folder / "ct.nii.gz")
    return expect(*scans, groups=1)


@case
def colour_planes_as_a_fifth_dimension(folder: Path) -> Expected:
    save(image(data=np.stack([HU] * 3, axis=-1)[..., None, :]), folder / "ct.nii.gz")
    return refuse(or_refused=True)


simple("one_slice", lambda: image(SCAN.but(shape=(1, 40, 48))), expect(or_refused=True))
simple("two_dimensions", lambda: image(data=HU[..., 13]), refuse(or_refused=True))
simple("five_slices", lambda: image(SCAN.but(shape=(5, 40, 48))), expect(SCAN.but(shape=(5, 40, 48)), or_refused=True))
simple(
    "sagittal_slices_first_axis_thin",
    lambda: image(Scan(shape=(12, 40, 40), step=(9.5, 0, 0), along=(0, 5.0, 0), down=(0, 0, -5.5))),
    expect(Scan(shape=(12, 40, 40), step=(9.5, 0, 0), along=(0, 5.0, 0), down=(0, 0, -5.5)), or_refused=True),
)
