"""Hard DICOM after what went wrong in public reports: identities, frames, values, words (see `support.ct_cases`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import FileDataset
from support.ct_cases import case, move, refused, renew_uid, series, stored_of
from support.ct_phantom import SHAPE, base_affine, sample

from maesil.synthetic.dicom import save_all, set_pixels

LONG = (40, 40, 48)
THIN = (48, 40, 48)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 24012\n"


def _uid(*parts: object) -> str:
    return str(pydicom.uid.generate_uid(entropy_srcs=[*map(str, parts)]))


# Identities ------------------------------------------------------------------------------------------


@case(used=40, shape=LONG, notes=("patient_id_varies",))
def patient_id_of_two_spellings(folder: Path, who: str) -> None:
    slices = series(who, LONG)
    for data in slices[20:]:
        data.PatientID = who + "-0"
    save_all(folder, slices)


@case(notes=("patient_id_varies",))
def patient_id_blank_in_every_second_slice(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices[::2]:
        data.PatientID = ""
    save_all(folder, slices)


@case(notes=("study_uid_varies",))
def study_uid_of_its_own_for_each_slice(folder: Path, who: str) -> None:
    slices = series(who)
    for k, data in enumerate(slices):
        data.StudyInstanceUID = _uid(who, "study", k)
    save_all(folder, slices)


@refused("several_owners")
def two_patients_between_one_another(folder: Path, who: str) -> None:
    """Each is regular by itself, and so are both together."""
    slices = series(who, (40, 40, 48))
    for data in slices[::2]:
        data.PatientID = who + "-other"
    save_all(folder, slices)


def _new_uids(slices: list[FileDataset], who: str, *names: str) -> None:
    for k, data in enumerate(slices):
        for name in names:
            setattr(data, name, _uid(who, name, k, data.SeriesNumber))


@case(notes=("series_reunited",))
def series_uid_of_its_own_for_each_slice(folder: Path, who: str) -> None:
    slices = series(who)
    _new_uids(slices, who, "SeriesInstanceUID")
    save_all(folder, slices)


@case(notes=("series_reunited",))
def all_uids_of_their_own_for_each_slice(folder: Path, who: str) -> None:
    slices = series(who)
    _new_uids(slices, who, "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
    save_all(folder, slices)


@case(volumes=2, used=48, max_error=30.51, mean_error=30.51, notes=("series_reunited",))
def two_phases_with_series_uids_of_their_own_for_each_slice(folder: Path, who: str) -> None:
    late = series(who, hu=sample(base_affine()) + 30, number=2)
    for data in late:
        renew_uid(data, "late")
    slices = [*series(who), *late]
    _new_uids(slices, who, "SeriesInstanceUID")
    save_all(folder, slices)


@refused("scattered_series")
def series_uid_of_its_own_for_each_slice_and_a_gap(folder: Path, who: str) -> None:
    slices = [data for k, data in enumerate(series(who)) if k not in (9, 10)]
    _new_uids(slices, who, "SeriesInstanceUID")
    save_all(folder, slices)


@refused("too_few_slices", status="skipped")
def single_images_during_an_intervention(folder: Path, who: str) -> None:
    slices = [data for k, data in enumerate(series(who)) if k not in (9, 10)]
    for k, data in enumerate(slices):
        data.SeriesNumber = 100 + k
    _new_uids(slices, who, "SeriesInstanceUID")
    save_all(folder, slices)


# Frames of reference ---------------------------------------------------------------------------------


@case(volumes=2, used=40, shape=(20, 40, 48))
def two_frames_of_reference(folder: Path, who: str) -> None:
    slices = series(who, LONG)
    for data in slices[20:]:
        data.FrameOfReferenceUID = _uid(who, "after a move")
    save_all(folder, slices)


@case(used=21, shape=(21, 40, 48), status="quarantined", code="frame_of_reference")
def last_slices_in_another_frame_of_reference(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices[21:]:
        data.FrameOfReferenceUID = _uid(who, "after a move")
    save_all(folder, slices)


@case()
def frame_of_reference_of_its_own_for_each_slice(folder: Path, who: str) -> None:
    slices = series(who)
    _new_uids(slices, who, "FrameOfReferenceUID")
    save_all(folder, slices)


@case()
def frame_of_reference_absent_from_half_of_the_slices(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices[12:]:
        del data.FrameOfReferenceUID
    save_all(folder, slices)


# Several stacks in one series ------------------------------------------------------------------------


@case(volumes=2, used=40, shape=(20, 40, 48))
def two_acquisitions_60_mm_apart(folder: Path, who: str) -> None:
    slices = series(who, (63, 40, 48))
    for data in slices[43:]:
        data.AcquisitionNumber = 2
    save_all(folder, [*slices[:20], *slices[43:]])


@case(volumes=2, used=40, shape=(20, 40, 48))
def two_acquisitions_off_the_grid(folder: Path, who: str) -> None:
    beyond = base_affine()
    beyond[2, 3] += 20 * beyond[2, 0] + 0.7
    slices = series(who, (20, 40, 48)) + series(who, (20, 40, 48), beyond)
    for data in slices[20:]:
        data.AcquisitionNumber = 2
        renew_uid(data, "second")
    save_all(folder, slices)


@case(volumes=2, used=40, shape=(20, 40, 48))
def the_centre_moves_half_way(folder: Path, who: str) -> None:
    beyond = base_affine()
    beyond[:3, 3] += (7.0, -4.0, 20 * beyond[2, 0])
    slices = series(who, (20, 40, 48)) + series(who, (20, 40, 48), beyond)
    for data in slices[20:]:
        renew_uid(data, "second")
    save_all(folder, slices)


@case(volumes=2, used=48)
def left_and_right(folder: Path, who: str) -> None:
    aside = base_affine()
    aside[0, 3] += 15.0
    right = series(who, affine=aside)
    for data in right:
        renew_uid(data, "right")
    save_all(folder, series(who) + right)


@case(volumes=2, used=48, max_error=30.51, mean_error=30.51)
def two_respiratory_phases(folder: Path, who: str) -> None:
    late = series(who, hu=sample(base_affine()) + 30)
    for data in late:
        renew_uid(data, "late")
    slices = series(who) + late
    for k, data in enumerate(slices):
        data.NominalPercentageOfRespiratoryPhase = 0.0 if k < SHAPE[0] else 50.0
    save_all(folder, slices)


@case(used=48, shape=THIN, max_error=3.0, mean_error=0.6, notes=("positions_rounded",))
def positions_of_one_decimal_on_thin_slices(folder: Path, who: str) -> None:
    slices = series(who, THIN, base_affine(spacing=(0.625, 1.7, 1.3)))
    for data in slices:
        data.ImagePositionPatient = [round(float(p), 1) for p in data.ImagePositionPatient]
    save_all(folder, slices)


@refused()
def positions_of_one_decimal_and_a_slice_missing(folder: Path, who: str) -> None:
    slices = series(who, THIN, base_affine(spacing=(0.625, 1.7, 1.3)))
    for data in slices:
        data.ImagePositionPatient = [round(float(p), 1) for p in data.ImagePositionPatient]
    del slices[30]
    save_all(folder, slices)


@refused()
def some_slices_moved_aside(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices[10:14]:
        move(data, dx=3.0)
    save_all(folder, slices)


# Values of the header --------------------------------------------------------------------------------


@case()
def elements_of_another_value_representation(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
            data[name] = DataElement(name, "IS", str(data[name].value))
        for name in ("ImagePositionPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
            values = data[name].value
            numbers = [float(v) for v in values] if isinstance(values, pydicom.multival.MultiValue) else float(values)
            data[name] = DataElement(name, "FD", numbers)
    save_all(folder, slices)


@case()
def rescale_written_twice(folder: Path, who: str) -> None:
    save_all(folder, series(who, extra={"RescaleSlope": [1, 1], "RescaleIntercept": [-1024, -1024]}))


@refused("bad_rescale")
def rescale_of_two_different_values(folder: Path, who: str) -> None:
    save_all(folder, series(who, extra={"RescaleSlope": [1, 2]}))


@refused("bad_header")
def bits_allocated_absent(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        del data.BitsAllocated
    save_all(folder, slices)


@case()
def pixel_representation_absent(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        del data.PixelRepresentation
    save_all(folder, slices)


@refused("bad_header")
def pixel_representation_absent_and_it_matters(folder: Path, who: str) -> None:
    slices = series(who, rescale=(1.0, 0.0))
    for data in slices:
        del data.PixelRepresentation
    save_all(folder, slices)


@case(notes=("quadruped",))
def quadruped(folder: Path, who: str) -> None:
    save_all(folder, series(who, extra={"AnatomicalOrientationType": "QUADRUPED"}))


@case(notes=("animal",))
def animal(folder: Path, who: str) -> None:
    save_all(folder, series(who, extra={"PatientSpeciesDescription": "Felis catus"}))


# Words -----------------------------------------------------------------------------------------------


def _metal(peak: float = 2900.0) -> np.ndarray:
    """The phantom with a ball of metal in its middle."""
    hu = sample(base_affine())
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    ball = (z - 12) ** 2 + (y - 20) ** 2 + (x - 24) ** 2 < 12
    return np.where(ball, peak, hu)


@case(max_error=4000.0, mean_error=40.0, notes=("whole_words",))
def metal_in_more_bits_than_the_header_says(folder: Path, who: str) -> None:
    slices = series(who, hu=_metal(), rescale=(1.0, 0.0))
    for data in slices:
        data.BitsStored, data.HighBit = 12, 11
    save_all(folder, slices)


@refused("wrapped")
def specks_of_unsigned_underflow(folder: Path, who: str) -> None:
    hu = np.rint(sample(base_affine()))
    noise = np.random.default_rng(0).normal(0, 12, hu.shape)
    slices = series(who)
    for data, plane in zip(slices, np.where(hu < -950, hu + 4 + noise, hu), strict=True):
        set_pixels(data, np.rint(plane + 1024).astype(np.int64).astype(np.uint16))
    save_all(folder, slices)


@refused("wrapped")
def metal_beyond_16_bits(folder: Path, who: str) -> None:
    slices = series(who)
    for data, plane in zip(slices, _metal(41000.0), strict=True):
        set_pixels(data, np.rint(plane + 1024).astype(np.int64).astype(np.int16))
    save_all(folder, slices)


@refused()
def hu_in_12_bits_read_as_unsigned(folder: Path, who: str) -> None:
    """Body fills the field of view: little air is in it."""
    affine = base_affine(spacing=(2.6, 0.85, 0.65), origin=(-14.0, -16.0, -804.5))
    slices = series(who, affine=affine, hu=sample(affine) - 60, rescale=(1.0, 0.0))
    for data in slices:
        set_pixels(data, stored_of(data).astype(np.uint16) & 0xFFF)
        data.BitsStored, data.HighBit = 12, 11
    save_all(folder, slices)


# Encodings -------------------------------------------------------------------------------------------


@case()
def native_pixels_under_a_compressed_syntax(folder: Path, who: str) -> None:
    slices = series(who)
    for path in save_all(folder, slices):
        written = path.read_bytes()
        native = b"1.2.840.10008.1.2.1\0"
        assert native in written
        path.write_bytes(written.replace(native, b"1.2.840.10008.1.2.5\0", 1))


@refused("bad_pixels")
def encoded_pixels_under_a_native_syntax(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        data.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        encoded = data.PixelData
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data["PixelData"].is_undefined_length = False
        data.PixelData = encoded
    save_all(folder, slices)


@case(max_error=4000.0, mean_error=40.0, notes=("whole_words",))
def metal_in_more_bits_than_the_header_says_in_rle(folder: Path, who: str) -> None:
    slices = series(who, hu=_metal(), rescale=(1.0, 0.0))
    for data in slices:
        data.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        data.BitsStored, data.HighBit = 12, 11
    save_all(folder, slices)
