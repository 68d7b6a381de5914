"""Outside cases: phases and series within one series UID, and slices that are there twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conformance.case import CASES, SCAN, case, simple, tags
from conformance.dicom import each, series, set_pixels, stored_of, uid, write_all
from conformance.judge import Expected, expect, refuse
from pydicom.dataset import Dataset


def _two(
    name: str,
    first: Callable[[Dataset, int], None],
    second: Callable[[Dataset, int], None],
    same: bool = False,
    either: bool = False,
) -> None:
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
