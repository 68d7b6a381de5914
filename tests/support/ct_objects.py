"""Hard DICOM: whose slices they are, what lies beside them, and damage (see `support.ct_cases`)."""

from __future__ import annotations

import random
import warnings
from copy import deepcopy
from pathlib import Path

import pydicom
from pydicom.dataset import FileDataset
from support.ct_cases import case, refused, renew_uid, series
from support.ct_phantom import SHAPE, base_affine

from maesil.synthetic.dicom import save_all

# Identity ------------------------------------------------------------------------------------------


@case(volumes=2, used=48)
def two_series_same_name(folder: Path, who: str) -> None:
    save_all(folder, series(who), [f"{k:03d}a" for k in range(24)])
    save_all(folder, series(who, series="series 2"), [f"{k:03d}b" for k in range(24)])


@case(volumes=2, used=48)
def two_patients(folder: Path, who: str) -> None:
    save_all(folder / "one", series(who))
    save_all(folder / "two", series(who + "-other"))


@case(volumes=2, used=48)
def two_patients_one_series_uid(folder: Path, who: str) -> None:
    slices, others = series(who), series(who)
    for data in others:
        data.PatientID = who + "-other"
        renew_uid(data, "other")
    save_all(folder, slices + others)


@case()
def uids_blanked(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        data.StudyInstanceUID = data.SeriesInstanceUID = data.SOPClassUID = data.PatientID = ""
        data.PatientName = ""
    save_all(folder, slices)


@case()
def uid_is_a_path(folder: Path, who: str) -> None:
    paths = {"SeriesInstanceUID": "../../../../etc/x", "StudyInstanceUID": "/etc/passwd"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom remarks that these are no UIDs
        save_all(folder, series(who, extra=paths))


# Other objects beside the CT -----------------------------------------------------------------------


def _localizer(who: str, **identity) -> FileDataset:
    affine = base_affine()[:, [1, 0, 2, 3]]
    data = series(who, (1, 24, 48), affine, **identity)[0]
    data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    renew_uid(data, "localizer")
    return data


@case(status="skipped")
def localizer_inside(folder: Path, who: str) -> None:
    save_all(folder, [_localizer(who), *series(who)])


@case(status="skipped")
def localizer_series(folder: Path, who: str) -> None:
    save_all(folder, [_localizer(who, series="scout"), *series(who)])


@case(status="skipped")
def coronal_reformat(folder: Path, who: str) -> None:
    affine = base_affine()[:, [1, 0, 2, 3]]
    save_all(folder / "ct", series(who))
    kind = {"ImageType": ["DERIVED", "SECONDARY", "MPR"]}
    save_all(folder / "mpr", series(who, (40, 24, 48), affine, series="coronal", extra=kind))


@case()
def other_objects(folder: Path, who: str) -> None:
    slices = series(who)
    kinds = {
        "SecondaryCaptureImageStorage": "OT",
        "XRayRadiationDoseSRStorage": "SR",
        "RTStructureSetStorage": "RTSTRUCT",
        "SegmentationStorage": "SEG",
        "MRImageStorage": "MR",
        "EncapsulatedPDFStorage": "DOC",
    }
    for sop_class, modality in kinds.items():
        data = deepcopy(slices[3])
        renew_uid(data, sop_class)
        data.Modality = modality
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = getattr(pydicom.uid, sop_class)
        data.SeriesInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[who, sop_class])
        if modality not in ("OT", "SEG", "MR"):
            del data.PixelData
        slices.append(data)
    capture = deepcopy(slices[24])  # a dose page kept in the CT's own series
    renew_uid(capture, "page")
    capture.Modality, capture.SeriesInstanceUID = "CT", slices[0].SeriesInstanceUID
    save_all(folder, [capture, *slices])


@case(status="ignored")
def junk_around(folder: Path, who: str) -> None:
    save_all(folder, series(who))
    (folder / "empty.dcm").write_bytes(b"")
    (folder / "report.pdf").write_bytes(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n")
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1" + bytes(60))
    (folder / "notes.txt").write_text("slices 3 to 9 repeated\n")
    (folder / "noise.dcm").write_bytes(random.Random(1).randbytes(5000))


@case()
def symlink_loop(folder: Path, who: str) -> None:
    save_all(folder / "ct", series(who))
    (folder / "ct" / "again").symlink_to(folder, target_is_directory=True)


# Damage --------------------------------------------------------------------------------------------


@refused()
def pixels_cut_in_half(folder: Path, who: str) -> None:
    path = save_all(folder, series(who))[13]
    path.write_bytes(path.read_bytes()[: -SHAPE[1] * SHAPE[2]])


@refused()
def header_cut(folder: Path, who: str) -> None:
    path = save_all(folder, series(who))[13]
    path.write_bytes(path.read_bytes()[:420])


@case()
def no_preamble(folder: Path, who: str) -> None:
    for path in save_all(folder, series(who)):
        path.write_bytes(path.read_bytes()[132:])
