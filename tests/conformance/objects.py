"""Outside cases: what lies beside a CT, and who it belongs to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conformance.case import SCAN, case, simple, tags
from conformance.dicom import each, series, set_pixels, uid, write, write_all
from conformance.judge import Expected, expect
from conformance.phantom import Scan


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
