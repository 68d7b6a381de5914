"""Outside cases: names and numbers that must not decide, positions and orientations that must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from conformance.case import CASES, SCAN, case, simple, tags
from conformance.dicom import each, series, uid, write, write_all
from conformance.judge import Expected, expect, refuse
from conformance.phantom import Scan, rotation
from pydicom.dataset import Dataset


@case
def names_with_spaces_and_unicode_and_newlines(folder: Path) -> Expected:
    for k, ds in enumerate(series(SCAN)):
        write(ds, folder / f"Röntgen {k % 3}" / f"скан\n{(k * 7) % 26} 🫁 " / "same name.nii.gz")
    return expect(SCAN, counted={"committed": 26})


@case
def one_folder_a_slice_and_all_of_one_name(folder: Path) -> Expected:
    for k, ds in enumerate(series(SCAN)):
        write(ds, folder / f"{(k * 11) % 26}" / "DICOM" / "image.tmp~")
    return expect(SCAN)


simple(
    "instance_number_all_seven_and_slice_location_reversed",
    lambda ds, k: tags(InstanceNumber=7, SliceLocation=-3.3 * k, SpacingBetweenSlices=17)(ds, k),
    expect(SCAN),
)
simple("no_instance_number_no_slice_location", tags(InstanceNumber=None, SliceThickness=None), expect(SCAN))
simple("instance_number_not_a_number", tags(InstanceNumber=""), expect(SCAN))


def _geometry(name: str, scan: Scan, **values: object) -> None:
    simple(name, tags(**values), expect(scan), scan)


_geometry("descending", SCAN.but(step=(0, 0, -5.5)))
_geometry("table_at_minus_1500", SCAN.but(table=(12.5, -180.25, -1512.375)))
_geometry("feet_first_prone", SCAN.but(along=(-4.6, 0, 0), down=(0, -5.0, 0)), PatientPosition="FFP")
_geometry("decubitus_right", SCAN.but(along=(0, 4.6, 0), down=(-5.0, 0, 0), shape=(26, 44, 44)), PatientPosition="HFDR")
_geometry("acquired_sagittal", Scan(shape=(40, 26, 40), step=(5.0, 0, 0), along=(0, 5.0, 0), down=(0, 0, -5.5)))
_geometry("acquired_coronal", Scan(shape=(38, 26, 48), step=(0, -5.25, 0), along=(4.6, 0, 0), down=(0, 0, -5.5)))
_geometry("oblique_three_ways", SCAN.turned(17, -11, 24))
_geometry("left_handed_stack", SCAN.but(along=(-4.6, 0, 0)))
_geometry("thickness_overlaps", SCAN, SliceThickness=11)
_geometry("thickness_zero_and_spacing_tag_negative", SCAN, SliceThickness=0, SpacingBetweenSlices=-5.5)
_geometry("tilt_only_in_the_tag", SCAN, GantryDetectorTilt=-17.5)
_geometry(
    "tilt_of_22_degrees_backwards",
    SCAN.but(step=(0, 5.5 * np.tan(np.deg2rad(-22)), 5.5), resampled=True, tolerance=90),
    GantryDetectorTilt=-22,
)
_geometry(
    "drift_in_both_directions_sagittal",
    Scan(shape=(40, 26, 40), step=(5.0, 0.6, -0.4), along=(0, 5.0, 0), down=(0, 0, -5.5), resampled=True, tolerance=90),
)
_geometry("only_sixteen_slices", SCAN.part(4, 20))
_geometry("thin_rows_wide_columns", Scan(shape=(26, 96, 24), down=(0, 2.1, 0), along=(9.2, 0, 0)))


@case
def fifteen_slices(folder: Path) -> Expected:
    write_all(series(SCAN.part(0, 15)), folder)
    return expect(counted={"too_few_slices": 15})


def _rounded(digits: int, tag: str = "ImagePositionPatient") -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, _: int) -> None:
        setattr(ds, tag, [f"{float(value):.{digits}f}" for value in getattr(ds, tag)])

    return change


simple(
    "positions_of_two_digits",
    _rounded(2),
    expect(SCAN.but(step=(0, 0, 5.3333), tolerance=1)),
    SCAN.but(step=(0, 0, 5.3333)),
)
simple(
    "positions_of_three_digits_thin",
    _rounded(3),
    expect(Scan(shape=(60, 40, 48), step=(0, 0, 0.41667), tolerance=1)),
    Scan(shape=(60, 40, 48), step=(0, 0, 0.41667)),
)
simple(
    "cosines_of_four_digits_oblique",
    _rounded(4, "ImageOrientationPatient"),
    expect(SCAN.turned(3, 7, -13).but(tolerance=12, resampled=True)),
    SCAN.turned(3, 7, -13),
)
simple(
    "minus_zero_and_tiny_cosines",
    tags(ImageOrientationPatient=["1", "-0.0", "1e-17", "-0", "1.0", "-2.05e-10"]),
    expect(SCAN),
)
simple("cosines_too_long_by_a_hair", tags(ImageOrientationPatient=[1.003, 0, 0, 0, 0.998, 0]), expect(SCAN))
simple(
    "cosines_too_long_by_five_percent",
    tags(ImageOrientationPatient=[1.05, 0, 0, 0, 1.05, 0]),
    refuse("bad_orientation"),
)
simple(
    "cosines_of_five",
    tags(ImageOrientationPatient=[1, 0, 0, 0, 1]),
    refuse("bad_orientation", "no_geometry", "bad_header"),
)
simple("cosines_not_numbers", tags(ImageOrientationPatient=["nan", "0", "0", "0", "1", "0"]), refuse())
simple("pixel_spacing_of_one_value", tags(PixelSpacing=[5.0]), refuse("bad_spacing", "no_geometry", "bad_header"))
simple("pixel_spacing_zero", tags(PixelSpacing=[0, 0]), refuse("bad_spacing", "no_geometry"))
simple(
    "aspect_ratio_instead_of_spacing",
    tags(PixelSpacing=None, PixelAspectRatio=[1, 1]),
    refuse("no_geometry", "bad_spacing"),
)
simple(
    "imager_spacing_instead_of_spacing",
    tags(PixelSpacing=None, ImagerPixelSpacing=[5.0, 4.6]),
    refuse("no_geometry", "bad_spacing"),
)
simple(
    "no_positions_but_slice_location",
    lambda ds, k: tags(ImagePositionPatient=None, SliceLocation=5.5 * k)(ds, k),
    refuse("no_geometry"),
)
simple("positions_all_zero", tags(ImagePositionPatient=[0, 0, 0]), refuse("position_conflict", "no_geometry"))


@case
def long_decimal_strings_and_spaces(folder: Path) -> Expected:
    slices = series(SCAN)
    for ds in slices:
        for tag in ("ImagePositionPatient", "PixelSpacing"):
            element = ds[tag]
            texts = [f" {float(v):+.17E} " for v in element.value]
            del ds[tag]
            ds.add_new(element.tag, "LO", texts)
    for path in write_all(slices, folder):
        data = path.read_bytes()
        for head in (b"\x20\x00\x32\x00", b"\x28\x00\x30\x00"):
            data = data.replace(head + b"LO", head + b"DS")
        path.write_bytes(data)
    return expect(SCAN)


@case
def decimal_commas(folder: Path) -> Expected:
    for path in write_all(each(series(SCAN), tags(PixelSpacing=["5.00", "4.60"])), folder):
        path.write_bytes(path.read_bytes().replace(b"5.00\\4.60", b"5,00\\4,60"))
    return expect(SCAN, or_refused=True)


def _missing(name: str, gone: set[int], expected: Expected) -> None:
    def write_case(folder: Path) -> Expected:
        write_all([ds for k, ds in enumerate(series(SCAN)) if k not in gone], folder)
        return expected

    CASES[name] = write_case


_missing("last_but_one_missing", {24}, refuse("gap"))
_missing("every_other_missing_in_one_half", {14, 16, 18, 20, 22, 24}, refuse("gap", "irregular_spacing"))
_missing("two_gaps", {6, 15, 16}, refuse("gap"))
_missing("two_gaps_to_fill_one_too_long", {6, 15, 16}, refuse("gap", options=("--fill-gaps", "1")))
_missing("first_and_last_missing", {0, 25}, expect(SCAN.part(1, 25)))


@case
def gap_of_one_filled(folder: Path) -> Expected:
    write_all([ds for k, ds in enumerate(series(SCAN)) if k != 11], folder)
    lost = np.zeros(SCAN.shape, bool)
    lost[11] = True
    return expect(SCAN.but(tolerance=1e9), interpolated=True, options=("--fill-gaps", "1"), notes=("gaps_filled",))


def _moved(k_moved: int, vector: tuple[float, float, float]) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        if k == k_moved:
            ds.ImagePositionPatient = [float(p) + v for p, v in zip(ds.ImagePositionPatient, vector, strict=True)]

    return change


simple("last_slice_aside_by_2_mm", _moved(25, (0, 2, 0)), refuse("drift", "irregular_spacing"))
simple("slice_early_by_a_tenth_of_a_gap", _moved(9, (0, 0, -0.55)), refuse("irregular_spacing", "gap", "drift"))
simple(
    "jitter_of_a_micrometre",
    lambda ds, k: _moved(k, (1e-3 * (-1) ** k, 0, 1e-3 * (k % 3 - 1)))(ds, k),
    expect(SCAN.but(tolerance=1)),
)


@case
def last_third_turned_by_half_a_degree(folder: Path) -> Expected:
    slices = series(SCAN)
    turn = rotation(0, 0, 0.5)
    for ds in slices[18:]:
        ds.ImageOrientationPatient = [f"{v:.9f}" for v in (*turn[:, 0], *turn[:, 1])]
    write_all(slices, folder)
    return expect(SCAN.part(0, 18), or_refused=True)


@case
def one_slice_upside_down(folder: Path) -> Expected:
    slices = series(SCAN)
    slices[8].ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
    write_all(slices, folder)
    return refuse()


@case
def spacing_three_then_one(folder: Path) -> Expected:
    a, b = SCAN.but(shape=(18, 40, 48), step=(0, 0, 3)), SCAN.but(shape=(18, 40, 48), step=(0, 0, 1))
    b = b.but(middle=(3, -2, 4 + 25.5 + 3 + 8.5))
    write_all([*series(a), *each(series(b), lambda ds, k: tags(SOPInstanceUID=uid("b", k))(ds, k))], folder)
    return refuse("irregular_spacing", "gap")


@case
def two_stations_400_mm_apart(folder: Path) -> Expected:
    far = SCAN.but(shape=(20, 40, 48), middle=(3, -2, 404))
    write_all([*series(SCAN), *each(series(far), lambda ds, k: tags(SOPInstanceUID=uid("far", k))(ds, k))], folder)
    return expect(SCAN, far)


@case
def pixel_spacing_changes_for_the_last_six(folder: Path) -> Expected:
    zoomed = SCAN.but(along=(5.52, 0, 0), down=(0, 6.0, 0))
    write_all([*series(SCAN)[:20], *series(zoomed)[20:]], folder)
    return expect(SCAN.part(0, 20), or_refused=True)


@case
def matrix_grows_half_way(folder: Path) -> Expected:
    fine = SCAN.but(shape=(26, 80, 96), along=(2.3, 0, 0), down=(0, 2.5, 0))
    write_all([*series(SCAN)[:13], *series(fine)[13:]], folder)
    return refuse()
