"""DICOM as CT folders really hold it: one builder a twist, and what ingest must make of it.

A builder writes one folder; `CASES` says how many volumes must come of it, how many files they use, and how
far (HU) their voxels may be from the phantom (`support.ct_phantom`). All else must be refused with a code.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset
from support.ct_phantom import SHAPE, SPACING, base_affine, rotated, sample

from maesil.synthetic.dicom import SeriesIdentity, ct_series, save_all, set_pixels

Builder = Callable[[Path, str], None]
ROUNDING = 0.51
"""HU were rounded once (0.5)."""


@dataclass(frozen=True)
class Case:
    """What must come of the folder that ``build`` writes."""

    build: Builder
    volumes: int = 1
    used: int = 24
    shape: tuple[int, int, int] | None = SHAPE
    max_error: float = ROUNDING
    mean_error: float = ROUNDING
    code: str | None = None  # the code that the refused files must carry
    status: str | None = None  # their status; None: anything but used
    refusal_is_right_too: bool = False  # the list allows "or quarantine"
    notes: tuple[str, ...] = ()  # that each volume must carry

    @property
    def clean(self) -> bool:
        return self.volumes == 1 and self.shape == SHAPE and self.max_error == ROUNDING


CASES: dict[str, Case] = {}


def case(**expected) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        CASES[build.__name__] = Case(build, **expected)
        return build

    return register


def refused(code: str | None = None, status: str = "quarantined") -> Callable[[Builder], Builder]:
    return case(volumes=0, used=0, code=code, status=status)


def series(who: str, shape=SHAPE, affine=None, hu=None, **identity) -> list[FileDataset]:
    """The phantom's slices as data sets, from the feet up; ``identity`` goes to `SeriesIdentity`."""
    affine = base_affine() if affine is None else affine
    hu = sample(affine, shape) if hu is None else hu
    return ct_series(hu, affine, SeriesIdentity(patient=who, **identity))


def stored_of(data: FileDataset) -> np.ndarray:
    return np.frombuffer(data.PixelData, "<i2").reshape(data.Rows, data.Columns)


def renew_uid(data: FileDataset, *parts: object) -> None:
    data.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[data.SOPInstanceUID, *map(str, parts)])
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID


def move(data: FileDataset, dx: float = 0.0, dy: float = 0.0, dz: float = 0.0) -> None:
    data.ImagePositionPatient = [p + d for p, d in zip(data.ImagePositionPatient, (dx, dy, dz), strict=True)]


# Names and numbers ---------------------------------------------------------------------------------


@case()
def clean(folder: Path, who: str) -> None:
    save_all(folder, series(who))


@case()
def random_names_without_extension(folder: Path, who: str) -> None:
    names = [f"{number}" for number in random.Random(3).sample(range(10**6), SHAPE[0])]
    save_all(folder, series(who), names)


@case()
def instance_numbers_reversed(folder: Path, who: str) -> None:
    slices = series(who)
    for k, data in enumerate(slices):
        data.InstanceNumber = len(slices) - k
        data.SliceLocation = -k
    save_all(folder, slices)


@case()
def instance_numbers_absent(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        del data.InstanceNumber
    save_all(folder, slices)


@case()
def instance_numbers_constant(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        data.InstanceNumber = 7
    save_all(folder, slices)


@case()
def spacing_tags_lie(folder: Path, who: str) -> None:
    lies = {"SliceThickness": "5", "SpacingBetweenSlices": "4.0", "SliceLocation": "0"}
    save_all(folder, series(who, extra=lies))


@case()
def spread_over_folders(folder: Path, who: str) -> None:
    slices = series(who)
    save_all(folder / "a", slices[::2])
    save_all(folder / "b" / "c", slices[1::2])


# Completeness --------------------------------------------------------------------------------------


@refused("gap")
def one_slice_missing(folder: Path, who: str) -> None:
    save_all(folder, [data for k, data in enumerate(series(who)) if k != 10])


@refused("gap")
def block_missing(folder: Path, who: str) -> None:
    save_all(folder, [data for k, data in enumerate(series(who)) if not 9 <= k < 13])


@case(status="skipped")
def file_twice(folder: Path, who: str) -> None:
    slices = series(who)
    save_all(folder, [*slices, slices[5]])


@case(status="skipped")
def same_pixels_new_uid(folder: Path, who: str) -> None:
    slices = series(who)
    again = deepcopy(slices[5:8])
    for data in again:
        renew_uid(data, "again")
    save_all(folder, [*slices, *again])


@refused()
def same_position_other_pixels(folder: Path, who: str) -> None:
    slices = series(who)
    other = deepcopy(slices[11])
    renew_uid(other, "other")
    set_pixels(other, stored_of(slices[3]))
    save_all(folder, [*slices, other])


def _two_phases(who: str) -> tuple[list[FileDataset], list[FileDataset]]:
    first = series(who)
    second = series(who, hu=sample(base_affine()) + 30.0)
    for data in second:
        renew_uid(data, "second")
    return first, second


@case(volumes=2, used=48, max_error=30.51, mean_error=30.51)
def two_phases_told_apart(folder: Path, who: str) -> None:
    first, second = _two_phases(who)
    for data in second:
        data.AcquisitionNumber = 2
    save_all(folder, [data for pair in zip(first, second, strict=True) for data in pair])


@refused()
def two_phases_not_told_apart(folder: Path, who: str) -> None:
    first, second = _two_phases(who)
    save_all(folder, [*first, *second])


@refused(status="skipped")
def single_slice(folder: Path, who: str) -> None:
    save_all(folder, series(who)[:1])


@refused(status="skipped")
def fifteen_slices(folder: Path, who: str) -> None:
    save_all(folder, series(who)[:15])


# Geometry ------------------------------------------------------------------------------------------


@refused()
def spacing_changes(folder: Path, who: str) -> None:
    slices = series(who, affine=base_affine((1.0, *SPACING[1:])))
    for k, data in enumerate(slices[12:]):
        move(data, dz=2.0 * (k + 1))
    save_all(folder, slices)


@case()
def positions_jitter(folder: Path, who: str) -> None:
    slices = series(who)
    jitter = np.random.default_rng(5).uniform(-1e-6, 1e-6, (len(slices), 3))
    for data, (dx, dy, dz) in zip(slices, jitter, strict=True):
        move(data, dx, dy, dz)
    save_all(folder, slices)


@refused()
def one_slice_aside(folder: Path, who: str) -> None:
    slices = series(who)
    move(slices[9], dx=0.6)
    save_all(folder, slices)


@case(shape=None, max_error=32.0, mean_error=3.5)  # interpolated
def gantry_tilt(folder: Path, who: str) -> None:
    affine = base_affine()
    turned = rotated(affine, (15.0, 0.0, 0.0))
    affine[:3, 1:3] = turned[:3, 1:3]  # the planes are tilted, the table still moves along z
    affine[:3, 3] = turned[:3, 3] + (0.0, 7.5, 1.0)
    save_all(folder, series(who, affine=affine, extra={"GantryDetectorTilt": "15"}))


@case()
def tilt_in_the_tag_only(folder: Path, who: str) -> None:
    save_all(folder, series(who, extra={"GantryDetectorTilt": "15"}))


@case()
def feet_first_and_prone(folder: Path, who: str) -> None:
    affine = base_affine()
    affine[:3, 3] += affine[:3, :3] @ [23, 39, 47]
    affine[:3, :3] *= -1.0
    save_all(folder, series(who, affine=affine, extra={"PatientPosition": "FFP"}))


@case(shape=None)
def oblique(folder: Path, who: str) -> None:
    save_all(folder, series(who, affine=rotated(base_affine(), (9.0, -7.0, 12.0))))


@case(used=48)
def acquired_sagittal(folder: Path, who: str) -> None:
    affine = base_affine()
    affine = affine[:, [2, 0, 1, 3]]  # slices run along x
    save_all(folder, series(who, shape=(48, 24, 40), affine=affine))


@refused()
def one_slice_rotated(folder: Path, who: str) -> None:
    slices = series(who)
    cosine, sine = np.cos(np.radians(1.0)), np.sin(np.radians(1.0))
    slices[10].ImageOrientationPatient = [round(float(v), 10) for v in (cosine, sine, 0, -sine, cosine, 0)]
    save_all(folder, slices)


@case(volumes=2, used=40, shape=(20, 40, 48))
def two_blocks_far_apart(folder: Path, who: str) -> None:
    low = base_affine(origin=(-31.7, -33.1, -804.5))
    high = base_affine(origin=(-31.7, -33.1, -804.5 + 19 * SPACING[0] + 200.0))
    slices = series(who, (20, 40, 48), low) + series(who, (20, 40, 48), high)
    for k, data in enumerate(slices):
        renew_uid(data, k)
    save_all(folder, slices)


@case(volumes=2, used=48, shape=None, refusal_is_right_too=True)
def pixel_spacing_changes(folder: Path, who: str) -> None:
    long = base_affine((1.1, *SPACING[1:]))
    wide = base_affine((1.1, 1.9, 1.5))
    save_all(folder, series(who, (48, 40, 48), long)[:24] + series(who, (48, 40, 48), wide)[24:])


@case(volumes=2, used=48, shape=None, refusal_is_right_too=True)
def matrix_changes(folder: Path, who: str) -> None:
    long = base_affine((1.1, *SPACING[1:]))
    save_all(folder, series(who, (48, 40, 48), long)[:24] + series(who, (48, 36, 44), long)[24:])


def _without(keyword: str) -> Builder:
    def build(folder: Path, who: str) -> None:
        slices = series(who)
        for data in slices:
            delattr(data, keyword)
        save_all(folder, slices)

    return build


for _keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
    CASES[f"no_{_keyword}"] = Case(_without(_keyword), volumes=0, used=0, status="quarantined")


@refused()
def one_slice_without_position(folder: Path, who: str) -> None:
    slices = series(who)
    del slices[12].ImagePositionPatient
    save_all(folder, slices)


@refused()
def all_positions_equal(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        data.ImagePositionPatient = slices[0].ImagePositionPatient
    save_all(folder, slices)


@refused()
def orientation_not_orthogonal(folder: Path, who: str) -> None:
    save_all(folder, series(who, extra={"ImageOrientationPatient": [1, 0, 0, 0.3, 0.9539392, 0]}))


@refused()
def orientation_all_zero(folder: Path, who: str) -> None:
    save_all(folder, series(who, extra={"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}))


@refused()
def absurd_matrix(folder: Path, who: str) -> None:
    slices = series(who)
    for data in slices:
        data.Rows = data.Columns = 65535
    save_all(folder, slices)


def everything() -> Sequence[str]:
    """Names of all cases, those of intensities and encodings too."""
    import support.ct_encodings
    import support.ct_objects
    import support.ct_reported
    import support.ct_stand_ins
    import support.ct_unlisted  # noqa: F401  (all register their cases)

    return list(CASES)
