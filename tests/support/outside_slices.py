"""Outside cases of single-frame DICOM: geometry, phases, headers, HU. Each writes its input and returns what it must become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from tests.support.outside_dicom import Series, each, series, set_pixels, stored_of, uid, write, write_all
from tests.support.outside_judge import Expected, expect, refuse
from tests.support.outside_phantom import Scan, rotation

Case = Callable[[Path], Expected]
CASES: dict[str, Case] = {}
SCAN = Scan()


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def simple(name: str, change: Callable[[Dataset, int], None], expected: Expected, scan: Scan = SCAN) -> None:
    """Register a case that changes the slices of one series one by one."""

    def write_case(folder: Path) -> Expected:
        write_all(each(series(scan), change), folder)
        return expected

    CASES[name] = write_case


def tags(**values: object) -> Callable[[Dataset, int], None]:
    """Return a change that sets tags; None removes one."""

    def change(ds: Dataset, _: int) -> None:
        for tag, value in values.items():
            if value is None:
                ds.pop(tag, None)
            else:
                setattr(ds, tag, value)

    return change


# --- names, folders, numbers ------------------------------------------------------------------------------------


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

# --- geometry -----------------------------------------------------------------------------------------------------


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


# --- phases and series in one ---------------------------------------------------------------------------------------


def _two(name: str, first: Callable[[Dataset, int], None], second: Callable[[Dataset, int], None], same: bool = False,
         either: bool = False) -> None:  # fmt: skip
    late = SCAN.but(enhancement=130)

    def write_case(folder: Path) -> Expected:
        a = each(series(SCAN), first)
        b = each(series(late), lambda ds, k: tags(SOPInstanceUID=uid("second", k))(ds, k))
        write_all([*a, *each(b, second)], folder)
        return refuse("position_conflict") if same else expect(SCAN, late, or_refused=either)

    CASES[name] = write_case


nothing = tags()
_two("phases_nothing_tells_apart", nothing, nothing, same=True)
_two("phases_by_instance_number_alone", nothing, lambda ds, k: tags(InstanceNumber=k + 27)(ds, k), same=True)
_two("phases_by_acquisition_number", nothing, tags(AcquisitionNumber=3))
_two("phases_one_without_acquisition_number", nothing, tags(AcquisitionNumber=None), either=True)
_two("phases_by_trigger_time", tags(TriggerTime=120.5), tags(TriggerTime=480))
_two(
    "phases_by_trigger_time_with_jitter",
    lambda ds, k: tags(TriggerTime=120 + k % 2)(ds, k),
    lambda ds, k: tags(TriggerTime=480 + k % 2)(ds, k),
    either=True,
)
_two("phases_by_temporal_position", tags(TemporalPositionIdentifier=1), tags(TemporalPositionIdentifier=2))
_two("phases_by_cardiac_percentage", tags(NominalPercentageOfCardiacPhase=40), tags(NominalPercentageOfCardiacPhase=75))
_two("energies_by_kvp", tags(KVP=80), tags(KVP=140))
_two(
    "energies_by_monoenergetic_level",
    tags(MonoenergeticEnergyEquivalent=55.0),
    tags(MonoenergeticEnergyEquivalent=120.0),
    either=True,
)
_two(
    "kernels_in_one_series_uid",
    tags(ConvolutionKernel="Br40", SeriesNumber=3),
    tags(ConvolutionKernel="Bl57", SeriesNumber=4),
)
_two("series_numbers_in_one_series_uid", tags(SeriesNumber=301), tags(SeriesNumber=302))
_two(
    "descriptions_in_one_series_uid", tags(SeriesDescription="art 5.5"), tags(SeriesDescription="ven 5.5"), either=True
)
_two(
    "contrast_before_and_after",
    tags(ContentTime="101500", AcquisitionTime="101500"),
    tags(ContrastBolusAgent="Iopamidol", ContentTime="101640", AcquisitionTime="101640"),
)
_two("contrast_agent_alone", nothing, tags(ContrastBolusAgent="Iopamidol"), either=True)
_two("phases_by_image_comment", tags(ImageComments="70 %"), tags(ImageComments="40 %"), either=True)
_two(
    "energies_by_image_type",
    tags(ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI DUAL_ENERGY A"]),
    tags(ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI DUAL_ENERGY B"]),
)
_two(
    "phases_by_acquisition_number_that_counts_slices",
    lambda ds, k: tags(AcquisitionNumber=k + 1, TriggerTime=10)(ds, k),
    lambda ds, k: tags(AcquisitionNumber=k + 1, TriggerTime=60)(ds, k),
)
_two("phases_by_acquisition_uid", tags(AcquisitionUID=uid("p")), tags(AcquisitionUID=uid("q")), either=True)
_two("studies_of_one_series_uid", nothing, tags(StudyInstanceUID=uid("another study")))
_two("frames_of_reference_of_one_series_uid", nothing, tags(FrameOfReferenceUID=uid("another frame")), either=True)
_two("patients_by_id_alone", nothing, tags(PatientID="ID-other", StudyInstanceUID=uid("another study")))


simple("acquisition_number_differs_for_each_slice", lambda ds, k: tags(AcquisitionNumber=k + 1)(ds, k), expect(SCAN))
simple(
    "no_acquisition_numbers_and_times_differ",
    lambda ds, k: tags(AcquisitionNumber=None, AcquisitionTime=f"1015{k:02d}.25", ContentTime=f"1016{k:02d}")(ds, k),
    expect(SCAN),
)
simple("trigger_time_differs_for_each_slice", lambda ds, k: tags(TriggerTime=13.5 * k)(ds, k), expect(SCAN))
simple(
    "contrast_named_only_on_some_slices",
    lambda ds, k: tags(ContrastBolusAgent="Iodine" if k > 5 else None)(ds, k),
    expect(SCAN),
)
simple("kvp_absent_on_some_slices", lambda ds, k: tags(KVP=None if k % 4 else 120)(ds, k), expect(SCAN))
simple(
    "tube_current_and_exposure_differ",
    lambda ds, k: tags(XRayTubeCurrent=100 + k, Exposure=k, ExposureTime=500 + k)(ds, k),
    expect(SCAN),
)
simple(
    "window_and_comments_differ",
    lambda ds, k: tags(WindowCenter=40 + k, WindowWidth=400, ImageComments=f"slice {k}")(ds, k),
    expect(SCAN),
)
simple(
    "study_time_differs_for_each_slice",
    lambda ds, k: tags(SeriesTime=f"1015{k:02d}", StudyTime=f"1010{k:02d}")(ds, k),
    expect(SCAN),
)
simple("two_step_and_shoot_blocks", lambda ds, k: tags(AcquisitionNumber=1 if k < 13 else 2)(ds, k), expect(SCAN))
simple(
    "image_type_differs_in_the_tail",
    lambda ds, k: tags(ImageType=["ORIGINAL", "PRIMARY", "AXIAL", f"HELIX {k}"])(ds, k),
    expect(SCAN),
)


@case
def passes_half_a_step_apart_nothing_tells_apart(folder: Path) -> Expected:
    late = SCAN.but(enhancement=160, middle=(3, -2, 6.75))
    write_all([*series(SCAN), *each(series(late), lambda ds, k: tags(SOPInstanceUID=uid("late", k))(ds, k))], folder)
    return refuse()


@case
def passes_half_a_step_apart_by_acquisition(folder: Path) -> Expected:
    late = SCAN.but(enhancement=160, middle=(3, -2, 6.75))
    write_all(
        [
            *series(SCAN),
            *each(series(late), lambda ds, k: tags(SOPInstanceUID=uid("late", k), AcquisitionNumber=3)(ds, k)),
        ],
        folder,
    )
    return expect(SCAN, late)


@case
def overlapping_reconstruction_half_a_thickness_apart(folder: Path) -> Expected:
    fine = SCAN.but(shape=(52, 40, 48), step=(0, 0, 2.75))
    write_all(series(fine), folder)
    return expect(fine)


@case
def ten_phases(folder: Path) -> Expected:
    scans = [SCAN.but(enhancement=18.0 * n) for n in range(10)]
    for n, scan in enumerate(scans):
        write_all(
            each(
                series(scan),
                lambda ds, k, n=n: tags(
                    SOPInstanceUID=uid("ten", n, k), TemporalPositionIdentifier=n + 1, NumberOfTemporalPositions=10
                )(ds, k),
            ),
            folder,
            seed=n,
        )
    return expect(*scans)


# --- duplicates -----------------------------------------------------------------------------------------------------


@case
def whole_series_twice_in_two_folders(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "one")
    write_all(series(SCAN), folder / "two", seed=3)
    return expect(SCAN, counted={"duplicate_slice": 26})


@case
def half_of_the_slices_again_under_new_uids(folder: Path) -> Expected:
    again = each(series(SCAN)[::2], lambda ds, k: tags(SOPInstanceUID=uid("again", k), InstanceNumber=900 + k)(ds, k))
    write_all([*series(SCAN), *again], folder)
    return expect(SCAN, counted={"duplicate_slice": 13})


@case
def one_position_twice_one_pixel_differs(folder: Path) -> Expected:
    slices = series(SCAN)
    other = series(SCAN)[12]
    other.SOPInstanceUID = uid("other")
    stored = stored_of(other)
    stored[20, 20] += 1
    set_pixels(other, stored)
    write_all([*slices, other], folder)
    return refuse("position_conflict")


@case
def same_sop_uid_everywhere(folder: Path) -> Expected:
    write_all(each(series(SCAN), tags(SOPInstanceUID=uid("the one"))), folder)
    return expect(SCAN)


@case
def copied_to_another_patient(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "a")
    write_all(series(SCAN, patient="Doe^Jon"), folder / "b", seed=5)
    return expect(SCAN, SCAN, duplicates=1)


@case
def copied_to_another_patient_keep_first(folder: Path) -> Expected:
    write_all(series(SCAN), folder / "a")
    write_all(series(SCAN, patient="Doe^Jon"), folder / "b", seed=5)
    return expect(SCAN, options=("--duplicates", "keep-first"), counted={"duplicate_pixels": 26})


# --- other objects beside the CT --------------------------------------------------------------------------------------


@case
def scout_in_the_series_not_named_so(folder: Path) -> Expected:
    scout = series(Scan(shape=(1, 60, 48), step=(0, 1, 0), down=(0, 0, -5.5)))[0]
    scout.SOPInstanceUID = uid("scout")
    write_all([*series(SCAN), scout], folder)
    return expect(SCAN)


@case
def scouts_two_named_so(folder: Path) -> Expected:
    slices = series(SCAN)
    for n, (step, along) in enumerate((((0, 1, 0), (4.6, 0, 0)), ((1, 0, 0), (0, 4.6, 0)))):
        scout = series(Scan(shape=(1, 60, 48), step=step, along=along, down=(0, 0, -5.5)), name="scout" if n else "a")[
            0
        ]
        scout.ImageType, scout.SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], uid("scout", n)
        slices.append(scout)
    write_all(slices, folder)
    return expect(SCAN, counted={"localizer": 2})


@case
def colour_screenshot_in_the_series(folder: Path) -> Expected:
    shot = series(SCAN)[3]
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"):
        delattr(shot, tag)
    shot.SOPInstanceUID, shot.ImageType = uid("shot"), ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    shot.SamplesPerPixel, shot.PlanarConfiguration, shot.PhotometricInterpretation = 3, 0, "RGB"
    shot.BitsAllocated, shot.BitsStored, shot.HighBit = 8, 8, 7
    shot.PixelData = bytes(range(256)) * 22 + bytes(40 * 48 * 3 - 256 * 22)
    write_all([*series(SCAN), shot], folder)
    return expect(SCAN)


@case
def dose_page_with_a_place_in_the_patient(folder: Path) -> Expected:
    page = series(SCAN)[25]
    page.SOPInstanceUID, page.ImageType = uid("dose"), ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]
    page.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    set_pixels(page, np.zeros((128, 128), int) + 60)
    write_all([*series(SCAN), page], folder)
    return expect(SCAN)


@case
def whole_department_beside_the_ct(folder: Path) -> Expected:
    write_all(series(SCAN), folder)
    classes = {
        "88.67": "SR",
        "88.22": "SR",
        "481.3": "RTSTRUCT",
        "481.2": "RTDOSE",
        "481.5": "RTPLAN",
        "66.4": "SEG",
        "4": "MR",
        "128": "PT",
        "104.1": "DOC",
        "11.1": "PR",
        "20": "NM",
        "1.1": "DX",
        "9.1.1": "ECG",
        "66": "REG",
        "77.1.6": "SM",
        "30": "PT",
        "67": "RWV",
    }
    for tail, modality in classes.items():
        ds = series(SCAN, name=modality)[0]
        ds.SOPClassUID, ds.Modality, ds.SOPInstanceUID = f"1.2.840.10008.5.1.4.1.1.{tail}", modality, uid(tail)
        if modality in ("SR", "RTSTRUCT", "RTPLAN", "DOC", "PR", "ECG", "REG", "RWV"):
            del ds.PixelData
        write(ds, folder / "other" / tail)
    return expect(SCAN, counted={"committed": 26})


@case
def mr_with_the_series_uid_of_the_ct(folder: Path) -> Expected:
    mr = each(
        series(SCAN.but(enhancement=50)),
        lambda ds, k: tags(SOPClassUID="1.2.840.10008.5.1.4.1.1.4", Modality="MR", SOPInstanceUID=uid("mr", k))(ds, k),
    )
    write_all([*series(SCAN), *mr], folder)
    return expect(SCAN)


@case
def coronal_reformat_in_its_own_series(folder: Path) -> Expected:
    mpr = Scan(shape=(38, 26, 48), step=(0, -5.25, 0), down=(0, 0, -5.5))
    write_all(series(SCAN), folder)
    write_all(
        each(series(mpr, name="mpr"), tags(ImageType=["DERIVED", "SECONDARY", "REFORMATTED", "CT_SOM7 MPR"])),
        folder,
        seed=2,
    )
    return expect(SCAN, counted={"derived_reformat": 38})


@case
def coronal_reformat_asked_for(folder: Path) -> Expected:
    mpr = Scan(shape=(38, 26, 48), step=(0, -5.25, 0), down=(0, 0, -5.5))
    write_all(series(SCAN), folder)
    write_all(
        each(series(mpr, name="mpr"), tags(ImageType=["DERIVED", "SECONDARY", "REFORMATTED", "CT_SOM7 MPR"])),
        folder,
        seed=2,
    )
    return expect(SCAN, mpr, options=("--include-derived",))


simple(
    "derived_but_axial_and_anonymised",
    tags(ImageType=["DERIVED", "PRIMARY", "AXIAL"], DerivationDescription="anonymised"),
    expect(SCAN),
)
simple("no_image_type", tags(ImageType=None), expect(SCAN))
simple("modality_absent", tags(Modality=None), expect(SCAN, or_refused=True))


@case
def two_patients_of_one_name(folder: Path) -> Expected:
    other = SCAN.but(enhancement=90)
    write_all(series(SCAN), folder)
    write_all(series(other, name="b", PatientID="17", StudyInstanceUID=uid("17")), folder, seed=2)
    return expect(SCAN, other)


@case
def no_patient_id_but_one_study(folder: Path) -> Expected:
    """Two reconstructions of one study are one patient's, whoever that is: no split may divide them."""
    other = SCAN.but(enhancement=90)
    for n, scan in enumerate((SCAN, other)):
        write_all(each(series(scan, name=f"{n}"), tags(PatientID="", PatientName="")), folder, seed=n)
    return expect(SCAN, other, groups=1)


@case
def two_patients_and_three_series(folder: Path) -> Expected:
    scans = [SCAN, SCAN.but(enhancement=30), SCAN.but(enhancement=60)]
    for n, scan in enumerate(scans):
        write_all(series(scan, name=f"{n}", patient=("Roe^Ada", "Roe^Ada", "Doe^Jon")[n]), folder, seed=n)
    return expect(*scans, groups=2)


@case
def blocks_that_overlap_by_one_slice(folder: Path) -> Expected:
    """Step and shoot: the last slice of a block and the first of the next lie at one place, with other noise."""
    upper = SCAN.part(0, 18)
    lower = SCAN.but(enhancement=2).part(17, 26).but(shape=(20, 40, 48), middle=(3, -2, 4 + (17 + 9.5 - 12.5) * 5.5))
    second = each(series(lower), lambda ds, k: tags(SOPInstanceUID=uid("second block", k), AcquisitionNumber=3)(ds, k))
    write_all([*series(upper), *second], folder)
    return expect(upper, lower)


@case
def two_blanked_series_told_apart_by_frame_of_reference(folder: Path) -> Expected:
    other = SCAN.but(enhancement=90, table=(0, 0, 700))
    blank = tags(StudyInstanceUID="", SeriesInstanceUID="", PatientID="", PatientName="")
    write_all(each(series(SCAN), blank), folder / "a")
    write_all(each(each(series(other), blank), tags(FrameOfReferenceUID=uid("another"))), folder / "b", seed=2)
    return expect(SCAN, other)


simple(
    "uids_absent_altogether",
    tags(StudyInstanceUID=None, SeriesInstanceUID=None, SOPInstanceUID=None, FrameOfReferenceUID=None),
    expect(SCAN, notes=("blank_series_uid",)),
)
simple(
    "uids_that_are_paths",
    tags(SeriesInstanceUID="../../../tmp/evil", StudyInstanceUID="/etc/passwd", PatientID="..\\..\\x"),
    expect(SCAN),
)
simple("uids_of_300_characters", tags(SeriesInstanceUID="1." * 150 + "1"), expect(SCAN))

# --- HU ---------------------------------------------------------------------------------------------------------------


def _repixel(
    bits: int = 12, signed: int = 0, slope: float = 1, intercept: float = -1024
) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, _: int) -> None:
        hu = stored_of(ds) - 1024
        set_pixels(ds, np.rint((hu - intercept) / slope).astype(np.int64), bits=bits, signed=signed)
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept

    return change


simple("sixteen_bits_intercept_minus_32768", _repixel(16, 0, 1, -32768), expect(SCAN))
simple("sixteen_bits_signed_intercept_zero", _repixel(16, 1, 1, 0), expect(SCAN))
simple("slope_0.37", _repixel(16, 0, 0.37, -1024), expect(SCAN.but(tolerance=0.9)))
simple("slope_2_and_odd_intercept", _repixel(12, 0, 2, -1023), expect(SCAN.but(tolerance=1.6)))
simple(
    "rescale_differs_for_each_slice",
    lambda ds, k: _repixel(16, k % 2, 0.25 + 0.05 * (k % 5), -1024 + k)(ds, k),
    expect(SCAN.but(tolerance=0.9)),
)
simple("signed_and_unsigned_by_turns", lambda ds, k: _repixel(16, k % 2, 1, 0 if k % 2 else -1024)(ds, k), expect(SCAN))


def _high_bits(signed: int) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        hu = stored_of(ds) - 1024
        garbage = np.random.default_rng(k).integers(0, 16, hu.shape) << 12
        stored = (hu if signed else hu + 1024) & 0xFFF
        set_pixels(ds, stored | garbage, bits=12, signed=signed)
        ds.RescaleIntercept = 0 if signed else -1024
        if signed:
            ds.RescaleType = "HU"

    return change


simple("garbage_in_the_overlay_bits", _high_bits(0), expect(SCAN))
simple("garbage_above_signed_12_bits", _high_bits(1), expect(SCAN))


def _shifted(ds: Dataset, _: int) -> None:
    set_pixels(ds, stored_of(ds) << 4, bits=12)
    ds.HighBit = 15


simple("high_bit_15_of_12", _shifted, expect(SCAN, or_refused=True))
simple("thirty_two_bits_allocated", lambda ds, k: set_pixels(ds, stored_of(ds), bits=32, allocated=32), expect(SCAN))
simple("smallest_and_largest_values_wrong", tags(SmallestImagePixelValue=5000, LargestImagePixelValue=1), expect(SCAN))
simple(
    "monochrome1_signed",
    lambda ds, k: (_repixel(16, 1, 1, 0)(ds, k), tags(PhotometricInterpretation="MONOCHROME1")(ds, k)),
    expect(SCAN),
)
simple("rescale_type_us", tags(RescaleType="US"), expect(SCAN, or_refused=True))
simple("rescale_type_absent", tags(RescaleType=None), expect(SCAN))
simple("rescale_type_lower_case", tags(RescaleType="hu "), expect(SCAN))
simple("rescale_type_effective_atomic_number", tags(RescaleType="Z_EFF"), refuse("not_hu"))
simple("rescale_type_electron_density", tags(RescaleType="ED"), refuse("not_hu"))
simple(
    "no_intercept_only_slope",
    lambda ds, k: (_repixel(16, 1, 1, 0)(ds, k), tags(RescaleIntercept=None)(ds, k)),
    expect(SCAN, or_refused=True),
)
simple("slope_zero", tags(RescaleSlope=0), refuse())
simple("slope_empty", tags(RescaleSlope=""), expect(SCAN, or_refused=True))
simple("intercept_not_a_number", tags(RescaleIntercept="nan"), refuse())
simple(
    "no_rescale_values_hu",
    lambda ds, k: (
        _repixel(16, 1, 1, 0)(ds, k),
        tags(RescaleIntercept=None, RescaleSlope=None, RescaleType=None)(ds, k),
    ),
    expect(SCAN, notes=("no_rescale_tags",)),
)
simple(
    "no_rescale_values_plus_1024",
    tags(RescaleIntercept=None, RescaleSlope=None, RescaleType=None),
    refuse("offset_1024"),
)
simple("intercept_twice_applied", tags(RescaleIntercept=-2048), refuse())
simple("intercept_of_minus_1000", tags(RescaleIntercept=-1000), expect(SCAN.but(tolerance=26)))
simple(
    "one_slice_without_rescale",
    lambda ds, k: tags(RescaleIntercept=None, RescaleSlope=None)(ds, k) if k == 13 else None,
    refuse(),
)
simple(
    "one_slice_with_another_intercept_by_mistake",
    lambda ds, k: tags(RescaleIntercept=0)(ds, k) if k == 13 else None,
    refuse(),
)


def _hu(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, _: int) -> None:
        set_pixels(ds, np.rint(function(stored_of(ds) - 1024.0)).astype(np.int64), bits=16, signed=1)
        ds.RescaleIntercept = 0

    return change


simple("hu_times_ten", _hu(lambda hu: hu * 10), refuse())
simple("hu_halved", _hu(lambda hu: hu / 2), refuse())
simple("hu_clipped_to_a_narrow_window", _hu(lambda hu: hu.clip(-200, 300)), refuse())
simple("hu_clipped_to_minus_1000_and_1000", _hu(lambda hu: hu.clip(-1000, 1000)), expect(SCAN))
simple("hu_negated", _hu(lambda hu: -hu), refuse())
simple("all_zero", _hu(lambda hu: hu * 0), refuse())
simple("all_air", _hu(lambda hu: hu * 0 - 1000), refuse())


def _eight_bits(ds: Dataset, _: int) -> None:
    set_pixels(ds, ((stored_of(ds) - 1024.0).clip(-160, 240) + 160) * 255 / 400, bits=8, allocated=8)
    ds.RescaleIntercept = 0


simple("eight_bit_windowed", _eight_bits, refuse())

CIRCLE = ((np.arange(40)[:, None] - 19.5) / 20) ** 2 + ((np.arange(48)[None] - 23.5) / 24) ** 2 > 1
OUTSIDE = np.broadcast_to(CIRCLE, SCAN.shape)


def _padded(
    value: int, tag: int | None, signed: int = 1, intercept: float = 0, limit: int | None = None
) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        hu = stored_of(ds) - 1024
        stored = np.where(CIRCLE, value if limit is None else value + (k % (limit - value + 1)), hu - int(intercept))
        set_pixels(ds, stored, bits=16, signed=signed)
        ds.RescaleIntercept = intercept
        if tag is not None:
            ds.add_new("PixelPaddingValue", "US" if tag > 32767 else "SS", tag)
        if limit is not None:
            ds.add_new("PixelPaddingRangeLimit", "SS" if signed else "US", limit)

    return change


_padding = expect(SCAN, invalid=OUTSIDE)
simple("padding_minus_2000", _padded(-2000, -2000), _padding)
simple("padding_written_as_unsigned", _padded(-2000, 63536), _padding)
simple("padding_range", _padded(-2100, -2100, limit=-2000), _padding)
simple(
    "padding_range_the_other_way_round",
    _padded(-2100, -2000, limit=-2000),
    expect(SCAN, or_refused=True, invalid=OUTSIDE),
)
simple("padding_not_declared", _padded(-2000, None), expect(SCAN, invalid=OUTSIDE, notes=("undeclared_padding",)))
simple(
    "padding_not_declared_minus_3024",
    _padded(-2000, None, intercept=-1024),
    expect(SCAN, invalid=OUTSIDE, notes=("undeclared_padding",)),
)
simple("padding_tag_in_hu_by_mistake", _padded(0, -1024, signed=0, intercept=-1024), expect(SCAN.but(tolerance=26)))
simple("padding_tag_that_never_occurs", tags(PixelPaddingValue=3999), expect(SCAN))
simple("padding_unsigned_63536", _padded(63536, 63536, signed=0, intercept=-1024), _padding)
simple("palette_colour", tags(PhotometricInterpretation="PALETTE COLOR"), refuse("colour"))
simple("one_sample_called_rgb", tags(PhotometricInterpretation="RGB"), refuse("colour"))
simple(
    "one_slice_in_palette_colour",
    lambda ds, k: tags(PhotometricInterpretation="PALETTE COLOR" if k == 9 else "MONOCHROME2")(ds, k),
    refuse(),
)
simple("photometric_absent", tags(PhotometricInterpretation=None), expect(SCAN))
simple("data_set_trailing_padding", lambda ds, k: ds.add_new(0xFFFCFFFC, "OB", bytes(1024)), expect(SCAN))
simple("intercept_with_spaces_and_exponent", tags(RescaleIntercept="-1.024E3", RescaleSlope="1.0000"), expect(SCAN))
simple(
    "padding_only_on_some_slices",
    lambda ds, k: _padded(-2000, -2000 if k % 2 else None)(ds, k),
    expect(SCAN, invalid=OUTSIDE),
)


@case
def modality_lut_instead_of_rescale(folder: Path) -> Expected:
    lut = Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType = [4096, 0, 16], "HU"
    lut.LUTData = (np.arange(4096) - 1024).astype("<i2").tobytes()
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "OW"
    write_all(
        each(
            series(SCAN),
            tags(RescaleSlope=None, RescaleIntercept=None, RescaleType=None, ModalityLUTSequence=Sequence([lut])),
        ),
        folder,
    )
    return expect(SCAN, or_refused=True)


@case
def float_pixel_data(folder: Path) -> Expected:
    def change(ds: Dataset, _: int) -> None:
        values = (stored_of(ds) - 1024).astype("<f4")
        del ds.PixelData
        ds.FloatPixelData = values.tobytes()
        ds.BitsAllocated, ds.RescaleIntercept = 32, 0
        for tag in ("BitsStored", "HighBit", "PixelRepresentation"):
            delattr(ds, tag)

    write_all(each(series(SCAN), change), folder)
    return expect(SCAN, or_refused=True)
