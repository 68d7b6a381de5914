"""Outside cases of NIfTI: where voxels lie, how they are stored, and images that are no CT."""

from __future__ import annotations

import bz2
import gzip
import itertools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from tests.support.outside_judge import Expected, expect, refuse
from tests.support.outside_phantom import Scan
from tests.support.outside_slices import SCAN, Case

CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[f"nifti_{function.__name__}"] = function
    return function


def ras(scan: Scan) -> NDArray[np.float64]:
    """Return the NIfTI affine (i j k to RAS mm) of a scan."""
    affine = np.diag([-1.0, -1, 1, 1]) @ scan.affine
    affine[:, :3] = affine[:, 2::-1]
    return affine


def image(scan: Scan = SCAN, data: NDArray[Any] | None = None, sform: int = 1, qform: int = 1, kind: type = nibabel.Nifti1Image,
          dtype: Any = np.int16, slope: float = float("nan"), inter: float = float("nan")) -> Any:  # fmt: skip
    """Return an image of the scan; ``data`` (i j k) replaces its HU."""
    values = scan.values().transpose(2, 1, 0) if data is None else data
    made = kind(values.astype(dtype), ras(scan), dtype=np.dtype(dtype))
    made.set_sform(ras(scan), sform)
    made.set_qform(ras(scan), qform)
    made.header.set_xyzt_units("mm")
    made.header["scl_slope"], made.header["scl_inter"] = slope, inter
    made.header["descrip"] = b"Roe^Ada 1944"
    return made


def save(made: Any, path: Path, change: Callable[[bytearray], bytes | bytearray | None] | None = None) -> Path:
    """Write raw image bytes (to_bytes never rescales), gzipped where the name says so; ``change`` may bend them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = made.header.copy()
    endian = header.endianness
    data = np.asanyarray(made.dataobj)
    header["vox_offset"] = 0
    raw = bytearray(type(made)(data, made.affine, header).to_bytes())
    size = header.sizeof_hdr
    slots = {348: (112, "f"), 540: (176, "d")}[size]
    struct.pack_into(
        f"{endian}2{slots[1]}", raw, slots[0], float(made.header["scl_slope"]), float(made.header["scl_inter"])
    )
    raw = change(raw) or raw if change else raw
    path.write_bytes(gzip.compress(bytes(raw), 1, mtime=0) if path.suffix == ".gz" else bytes(raw))
    return path


def simple(name: str, make: Callable[[], Any], expected: Expected, change: Callable[[bytearray], bytes | bytearray | None] | None = None,
           file: str = "ct.nii") -> None:  # fmt: skip
    def write_case(folder: Path) -> Expected:
        save(make(), folder / file, change)
        return expected

    CASES[f"nifti_{name}"] = write_case


HU = SCAN.values().transpose(2, 1, 0)


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


# --- how numbers are stored -------------------------------------------------------------------------------------------

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

# --- containers and damage --------------------------------------------------------------------------------------------


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


# --- numbers that are no HU -------------------------------------------------------------------------------------------


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
