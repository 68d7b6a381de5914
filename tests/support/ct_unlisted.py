"""Hard DICOM inputs that follow from the principles without being on any list (see `support.ct_cases`)."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset
from support.ct_cases import CASES, case, move, refused, renew_uid, series, stored_of
from support.ct_encodings import enhanced_ct, outside_circle
from support.ct_phantom import SHAPE, SPACING, base_affine, sample

from maesil.synthetic.dicom import save_all, set_pixels

HALF_STEP = (0.0, 0.0, SPACING[0] / 2)


# Passes over the same positions ----------------------------------------------------------------------


def _second(who: str, offset=(0.0, 0.0, 0.0), level: float = 30.0) -> list[FileDataset]:
    affine = base_affine()
    affine[:3, 3] += offset
    slices = series(who, affine=affine, hu=sample(affine) + level)
    for data in slices:
        renew_uid(data, "second", *offset)
    return slices


@case(volumes=2, used=48, max_error=30.51, mean_error=30.51)
def two_phases_half_a_step_apart(folder: Path, who: str) -> None:
    """Together they look like one regular scan of half the step."""
    second = _second(who, HALF_STEP)
    for data in second:
        data.AcquisitionNumber = 2
    save_all(folder, series(who) + second)


@case(volumes=2, used=48, max_error=30.51, mean_error=30.51)
def two_phases_by_their_time(folder: Path, who: str) -> None:
    slices = series(who) + _second(who)
    for k, data in enumerate(slices):
        data.AcquisitionNumber = 1
        data.AcquisitionTime = "101500" if k < SHAPE[0] else "101530"
    save_all(folder, slices)


@case(volumes=2, used=48, max_error=30.51, mean_error=30.51)
def two_energies_by_their_image_type(folder: Path, who: str) -> None:
    second = _second(who)
    for data in second:
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", "HIGH"]
    save_all(folder, series(who) + second)


@refused("position_conflict")
def two_phases_and_a_number_for_every_slice(folder: Path, who: str) -> None:
    slices = series(who) + _second(who)
    for k, data in enumerate(slices):
        data.AcquisitionNumber = k + 1
    save_all(folder, slices)


@case()
def acquisitions_of_two_slices_each(folder: Path, who: str) -> None:
    """Step and shoot: one scan, although the acquisition number changes all along it."""
    slices = series(who)
    for k, data in enumerate(slices):
        data.AcquisitionNumber = 1 + k // 2
    save_all(folder, slices)


@case(used=24, status="quarantined")
def phase_with_a_gap_beside_a_whole_one(folder: Path, who: str) -> None:
    second = [data for k, data in enumerate(_second(who)) if k != 7]
    for data in second:
        data.AcquisitionNumber = 2
    save_all(folder, series(who) + second)


# Geometry ----------------------------------------------------------------------------------------------


@refused("drift")
def one_slice_aside_by_a_fifth_of_a_millimetre(folder: Path, who: str) -> None:
    slices = series(who)
    move(slices[9], dx=0.2)
    save_all(folder, slices)


@case(shape=None, max_error=40.0, mean_error=3.5)  # interpolated
def drifts_steadily_sideways(folder: Path, who: str) -> None:
    affine = base_affine()
    affine[0, 0] = 0.25
    save_all(folder, series(who, affine=affine))


@case(max_error=3.0, mean_error=0.6)
def cosines_of_three_digits(folder: Path, who: str) -> None:
    """Rounded cosines are up to 0.4 % too long, which must not stretch the grid."""
    affine = base_affine()
    slices = series(who, affine=affine)
    for data in slices:
        data.ImageOrientationPatient = [1.004, 0, 0, 0, 1.004, 0]
    save_all(folder, slices)


@refused("bad_spacing")
def negative_pixel_spacing(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        data.PixelSpacing = [-1.7, 1.3]
    save_all(folder, slices)


@refused()
def one_slice_of_another_matrix(folder: Path, who: str) -> None:
    slices = series(who)
    set_pixels(slices[8], stored_of(slices[8])[:-4, :-4])
    save_all(folder, slices)


# Intensities -------------------------------------------------------------------------------------------


@refused()
def unsigned_by_mistake(folder: Path, who: str) -> None:
    """Negative HU read as unsigned are near 65536: no CT holds that much metal."""
    slices = series(who, rescale=(1.0, 0.0))
    for data in slices:
        data.PixelRepresentation = 0
    save_all(folder, slices)


@refused()
def inverted(folder: Path, who: str) -> None:
    save_all(folder, series(who, hu=-sample(base_affine())))


@case()
def padding_of_zero_hu_in_the_corners(folder: Path, who: str) -> None:
    slices = series(who, rescale=(1.0, 0.0), padding=0)
    for data in slices:
        set_pixels(data, np.where(outside_circle(), np.int16(0), stored_of(data)))
    save_all(folder, slices)


@case()
def padding_of_several_values(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        data.add_new("PixelPaddingValue", "SS", [-2000, -1000])
    save_all(folder, slices)


# Headers -----------------------------------------------------------------------------------------------


@case()
def sop_class_nowhere(folder: Path, who: str) -> None:
    for path in save_all(folder, series(who)):
        data = pydicom.dcmread(path)
        data.SOPClassUID = ""
        del data.file_meta.MediaStorageSOPClassUID
        data.save_as(path, enforce_file_format=False)


@case()
def no_meta_group_at_all(folder: Path, who: str) -> None:
    for path in save_all(folder, series(who)):
        data = pydicom.Dataset(pydicom.dcmread(path))
        data.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)


@case()
def no_photometric_interpretation(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        del data.PhotometricInterpretation
    save_all(folder, slices)


@case(max_error=2.51, mean_error=2.51)
def uids_blanked_and_spread_over_folders(folder: Path, who: str) -> None:
    slices = series(who, hu=sample(base_affine()) + 2.0)  # known by content alone: it must not be another case's
    for data in slices:
        data.SeriesInstanceUID = ""
    save_all(folder / "a", slices[::2])
    save_all(folder / "b", slices[1::2])


@case(volumes=2, used=48, max_error=30.51, mean_error=30.51)
def uids_blanked_in_two_folders(folder: Path, who: str) -> None:
    first, second = series(who, hu=sample(base_affine()) + 3.0), _second(who, level=29.0)
    for data in first + second:
        data.SeriesInstanceUID = data.StudyInstanceUID = ""
    save_all(folder / "a", first)
    save_all(folder / "b", second)


@case(volumes=2, used=48, max_error=30.51, mean_error=30.51)
def uids_blanked_but_for_the_series_number(folder: Path, who: str) -> None:
    first, second = series(who, hu=sample(base_affine()) + 4.0), _second(who, level=28.0)
    for data in first + second:
        data.SeriesInstanceUID = data.StudyInstanceUID = ""
    for data in second:
        data.SeriesNumber = 5
    save_all(folder, first + second)


@case(status="skipped")
def page_without_a_place_in_the_series(folder: Path, who: str) -> None:
    slices = series(who)
    page = deepcopy(slices[3])
    renew_uid(page, "page")
    page.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    del page.ImagePositionPatient, page.ImageOrientationPatient, page.PixelSpacing
    save_all(folder, [page, *slices])


@case(volumes=2, used=48, max_error=9.51, mean_error=9.51)
def two_scans_of_one_patient_on_two_days(folder: Path, who: str) -> None:
    save_all(folder, series(who) + series(who, study="another day", hu=sample(base_affine()) + 9.0))


# Multi-frame -------------------------------------------------------------------------------------------


def _frames(data: FileDataset) -> list[pydicom.Dataset]:
    return list(data.PerFrameFunctionalGroupsSequence)


@case(used=1)
def enhanced_rescale_per_frame(folder: Path, who: str) -> None:
    data = enhanced_ct(who, list(range(24)))
    shared = data.SharedFunctionalGroupsSequence[0]
    values = shared.PixelValueTransformationSequence[0]
    del shared.PixelValueTransformationSequence
    pixels = np.frombuffer(data.PixelData, "<i2").reshape(24, -1).copy()
    for k, frame in enumerate(_frames(data)):
        own = deepcopy(values)
        own.RescaleIntercept = str(-1024 - 11 * k)
        frame.PixelValueTransformationSequence = pydicom.Sequence([own])
        pixels[k] += 11 * k
    data.PixelData = pixels.tobytes()
    save_all(folder, [data])


@case(used=1, shape=None, max_error=32.0, mean_error=4.0)
def enhanced_tilted(folder: Path, who: str) -> None:
    affine = base_affine()
    affine[1, 0] = 0.6
    slices = series(who, affine=affine)
    data = enhanced_ct(who, list(range(24)))
    data.PixelData = b"".join(single.PixelData for single in slices)
    for single, frame in zip(slices, _frames(data), strict=True):
        frame.PlanePositionSequence[0].ImagePositionPatient = single.ImagePositionPatient
    save_all(folder, [data])


@case(volumes=2, used=1, max_error=30.51, mean_error=30.51)
def enhanced_two_phases(folder: Path, who: str) -> None:
    data = enhanced_ct(who, [*range(24), *range(24)])
    later = b"".join(single.PixelData for single in _second(who))
    data.PixelData = data.PixelData[: len(later)] + later
    for k, frame in enumerate(_frames(data)):
        frame.FrameContentSequence[0].TemporalPositionIndex = 1 + k // 24
    save_all(folder, [data])


@case(used=2)
def enhanced_in_two_parts(folder: Path, who: str) -> None:
    """A concatenation (PS3.3 C.7.6.16.2.2.4): one volume spread over two objects."""
    parts = [enhanced_ct(who, list(range(24))[half]) for half in (slice(0, 12), slice(12, 24))]
    renew_uid(parts[1], "part 2")
    save_all(folder, parts)


@case(used=1)
def enhanced_monochrome1_compressed(folder: Path, who: str) -> None:
    data = enhanced_ct(who, list(range(24)))
    data.PhotometricInterpretation = "MONOCHROME1"
    data.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    save_all(folder, [data])


@refused()
def enhanced_cut(folder: Path, who: str) -> None:
    (path,) = save_all(folder, [enhanced_ct(who, list(range(24)))])
    path.write_bytes(path.read_bytes()[:-5000])


# Encoded files that were cut ---------------------------------------------------------------------------


def _cut(build, name: str) -> None:
    def build_cut(folder: Path, who: str) -> None:
        build(folder, who)
        path = sorted(folder.iterdir())[13]
        content = path.read_bytes()
        start = content.index(b"\xe0\x7f\x10\x00") if b"\xe0\x7f\x10\x00" in content else len(content) // 2
        path.write_bytes(content[: start + (len(content) - start) * 6 // 10])

    refused()(build_cut)
    CASES[f"cut_{name}"] = CASES.pop("build_cut")


def _shortened(build, name: str) -> None:
    """The encapsulation is whole, the stream within it is not."""

    def build_short(folder: Path, who: str) -> None:
        build(folder, who)
        path = sorted(folder.iterdir())[13]
        data = pydicom.dcmread(path)
        (stream,) = pydicom.encaps.generate_frames(data.PixelData, number_of_frames=1)
        data.PixelData = pydicom.encaps.encapsulate([stream[: len(stream) * 6 // 10 // 2 * 2]])
        data.save_as(path)

    refused()(build_short)
    CASES[f"shortened_{name}"] = CASES.pop("build_short")


for _name in ("rle", "jpeg_ls", "jpeg_2000", "htj2k", "jpeg_lossless", "deflated"):
    _cut(CASES[_name].build, _name)
    if _name != "deflated":
        _shortened(CASES[_name].build, _name)
