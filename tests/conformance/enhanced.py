"""Outside cases of Enhanced CT: frames in any order, stacks, phases, concatenations, and what may be missing."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
from conformance.case import CASES, SCAN, Case
from conformance.dicom import (
    LEGACY,
    SC_MULTI,
    compressed,
    enhanced,
    merged,
    set_pixels,
    stored_of,
    uid,
    write,
)
from conformance.judge import Expected, expect, refuse
from conformance.phantom import Scan
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

LATE = SCAN.but(enhancement=130)


def case(function: Case) -> Case:
    CASES[f"enhanced_{function.__name__}"] = function
    return function


def _frames(ds: Dataset) -> list[tuple[Dataset, bytes]]:
    size = ds.Rows * ds.Columns * ds.BitsAllocated // 8
    return [
        (frame, ds.PixelData[i * size : (i + 1) * size]) for i, frame in enumerate(ds.PerFrameFunctionalGroupsSequence)
    ]


def _with_frames(ds: Dataset, frames: list[tuple[Dataset, bytes]]) -> Dataset:
    ds.PerFrameFunctionalGroupsSequence = [frame for frame, _ in frames]
    ds.NumberOfFrames, ds.PixelData = len(frames), b"".join(pixels for _, pixels in frames)
    return ds


def _content(ds: Dataset, **tags: Any) -> Dataset:
    for frame in ds.PerFrameFunctionalGroupsSequence:
        for tag, value in tags.items():
            setattr(frame.FrameContentSequence[0], tag, value)
    return ds


def _shuffled(ds: Dataset, seed: int = 5) -> Dataset:
    frames = _frames(ds)
    random.Random(seed).shuffle(frames)
    return _with_frames(ds, frames)


@case
def rescale_per_frame_shuffled(folder: Path) -> Expected:
    write(_shuffled(enhanced(SCAN, rescale="frame")), folder / "e")
    return expect(SCAN.but(tolerance=0.8))


@case
def legacy_converted(folder: Path) -> Expected:
    write(enhanced(SCAN, sop_class=LEGACY), folder / "e")
    return expect(SCAN)


@case
def rle_of_shuffled_frames(folder: Path) -> Expected:
    ds = _shuffled(enhanced(SCAN))
    write(compressed(ds, RLELossless), folder / "e", RLELossless)
    return expect(SCAN)


@case
def two_stacks_apart(folder: Path) -> Expected:
    far = SCAN.but(middle=(3, -2, 354), shape=(20, 40, 48))
    write(_shuffled(merged(enhanced(SCAN), _content(enhanced(far), StackID="2"))), folder / "e")
    return expect(SCAN, far)


@case
def two_stacks_of_one_place(folder: Path) -> Expected:
    write(_shuffled(merged(enhanced(SCAN), _content(enhanced(LATE), StackID="2"))), folder / "e")
    return expect(SCAN, LATE, or_refused=True)


@case
def two_temporal_positions(folder: Path) -> Expected:
    parts = [_content(enhanced(scan), TemporalPositionIndex=n + 1) for n, scan in enumerate((SCAN, LATE))]
    write(_shuffled(merged(*parts)), folder / "e")
    return expect(SCAN, LATE)


@case
def two_phases_by_dimension_index_alone(folder: Path) -> Expected:
    parts = [enhanced(scan) for scan in (SCAN, LATE)]
    for n, part in enumerate(parts):
        for k, frame in enumerate(part.PerFrameFunctionalGroupsSequence):
            frame.FrameContentSequence[0].DimensionIndexValues = [n + 1, k + 1]
    write(_shuffled(merged(*parts)), folder / "e")
    return expect(SCAN, LATE)


@case
def two_cardiac_phases(folder: Path) -> Expected:
    parts = []
    for scan, percent in ((SCAN, 40.0), (LATE, 75.0)):
        part = enhanced(scan)
        for frame in part.PerFrameFunctionalGroupsSequence:
            frame.CardiacSynchronizationSequence = [Dataset()]
            frame.CardiacSynchronizationSequence[0].NominalPercentageOfCardiacPhase = percent
            frame.CardiacSynchronizationSequence[0].ActualCardiacTriggerDelayTime = percent * 8
        parts.append(part)
    write(merged(*parts), folder / "e")
    return expect(SCAN, LATE)


@case
def two_energies(folder: Path) -> Expected:
    parts = []
    for scan, kvp in ((SCAN, 80), (LATE, 140)):
        part = enhanced(scan)
        for frame in part.PerFrameFunctionalGroupsSequence:
            frame.CTXRayDetailsSequence = [Dataset()]
            frame.CTXRayDetailsSequence[0].KVP = kvp
        parts.append(part)
    write(merged(*parts), folder / "e")
    return expect(SCAN, LATE)


@case
def two_phases_nothing_tells_apart(folder: Path) -> Expected:
    write(merged(enhanced(SCAN), enhanced(LATE)), folder / "e")
    return refuse("position_conflict")


@case
def two_orientations(folder: Path) -> Expected:
    """Axial and coronal frames in one object: orientation and spacing are in the frames."""
    coronal = Scan(shape=(38, 40, 48), step=(0, -5.25, 0), down=(0, 0, -5.0))
    parts = [enhanced(SCAN), enhanced(coronal)]
    for part in parts:
        shared = part.SharedFunctionalGroupsSequence[0]
        for frame in part.PerFrameFunctionalGroupsSequence:
            frame.PlaneOrientationSequence = copy.deepcopy(shared.PlaneOrientationSequence)
            frame.PixelMeasuresSequence = copy.deepcopy(shared.PixelMeasuresSequence)
        del shared.PlaneOrientationSequence, shared.PixelMeasuresSequence
    write(_shuffled(merged(*parts)), folder / "e")
    return expect(SCAN, coronal)


@case
def concatenation_in_three_files(folder: Path) -> Expected:
    whole = enhanced(SCAN)
    frames = _frames(whole)
    for n, (start, stop) in enumerate(((0, 5), (5, 20), (20, 26))):
        part = _with_frames(copy.deepcopy(whole), copy.deepcopy(frames[start:stop]))
        part.ConcatenationUID, part.InConcatenationNumber, part.InConcatenationTotalNumber = (
            uid("concatenation"),
            n + 1,
            3,
        )
        part.ConcatenationFrameOffsetNumber, part.SOPInstanceUIDOfConcatenationSource = start, whole.SOPInstanceUID
        part.SOPInstanceUID = uid("part", n)
        write(part, folder / f"{(n * 2) % 3}" / "part")
    return expect(SCAN)


@case
def concatenation_middle_part_missing(folder: Path) -> Expected:
    whole = enhanced(SCAN)
    frames = _frames(whole)
    for n, (start, stop) in enumerate(((0, 10), (16, 26))):
        part = _with_frames(copy.deepcopy(whole), copy.deepcopy(frames[start:stop]))
        part.ConcatenationUID, part.InConcatenationNumber, part.InConcatenationTotalNumber = (
            uid("concatenation"),
            n * 2 + 1,
            3,
        )
        part.ConcatenationFrameOffsetNumber, part.SOPInstanceUID = start, uid("part", n)
        write(part, folder / f"{n}")
    return refuse("gap", "irregular_spacing")


@case
def concatenation_last_part_missing(folder: Path) -> Expected:
    """The header says that a third part exists; what is there is whole in itself, so both answers can be defended."""
    whole = enhanced(SCAN)
    part = _with_frames(copy.deepcopy(whole), copy.deepcopy(_frames(whole)[:20]))
    part.ConcatenationUID, part.InConcatenationNumber, part.InConcatenationTotalNumber = uid("concatenation"), 1, 2
    write(part, folder / "one")
    return expect(SCAN.part(0, 20), or_refused=True)


@case
def frame_missing(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    frames = _frames(ds)
    write(_with_frames(ds, frames[:9] + frames[10:]), folder / "e")
    return refuse("gap")


@case
def frame_twice(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    frames = _frames(ds)
    write(_with_frames(ds, [*frames, copy.deepcopy(frames[4])]), folder / "e")
    return expect(SCAN)


@case
def tilted(folder: Path) -> Expected:
    scan = SCAN.but(step=(0, 5.5 * np.tan(np.deg2rad(14)), 5.5), resampled=True, tolerance=90)
    write(_shuffled(enhanced(scan)), folder / "e")
    return expect(scan)


@case
def more_frames_claimed_than_there_are(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    ds.NumberOfFrames = 40
    write(ds, folder / "e")
    return refuse()


@case
def fewer_frames_claimed_than_there_are(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    ds.NumberOfFrames = 20
    write(ds, folder / "e")
    return refuse()


@case
def two_thousand_million_frames_claimed(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    ds.NumberOfFrames = 2**31 - 1
    write(ds, folder / "e")
    return refuse()


@case
def one_frame_without_position(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    del ds.PerFrameFunctionalGroupsSequence[7].PlanePositionSequence
    write(ds, folder / "e")
    return refuse()


@case
def no_functional_groups(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    del ds.PerFrameFunctionalGroupsSequence, ds.SharedFunctionalGroupsSequence
    write(ds, folder / "e")
    return refuse()


@case
def rescale_at_the_top_level(folder: Path) -> Expected:
    """Not where the standard puts it, but written by some converters."""
    ds = enhanced(SCAN)
    del ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    write(ds, folder / "e")
    return expect(SCAN, or_refused=True)


@case
def no_rescale_at_all(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    del ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    write(ds, folder / "e")
    return refuse("offset_1024", "bad_rescale", "bad_enhanced")


@case
def spectral_frames_not_in_hu(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleType = "MGML"
    write(ds, folder / "e")
    return refuse("not_hu")


@case
def derived_frames_of_thick_slabs(folder: Path) -> Expected:
    """Original axial frames, and a MIP of them in the same object."""
    original, slabs = enhanced(SCAN), enhanced(LATE)
    for frame in slabs.PerFrameFunctionalGroupsSequence:
        frame.CTImageFrameTypeSequence[0].FrameType = ["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"]
    write(merged(original, slabs), folder / "e")
    return expect(SCAN)


@case
def beside_the_same_series_in_single_frames(folder: Path) -> Expected:
    """The classic slices and their enhanced copy: the same scan twice, under one series or two."""
    from conformance.dicom import series, write_all

    write_all(series(SCAN), folder / "classic")
    write(enhanced(SCAN), folder / "e")
    return expect(SCAN, SCAN, duplicates=1)


@case
def secondary_capture_of_many_frames(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    write(ds, folder / "e")
    capture = enhanced(SCAN, name="capture", sop_class=SC_MULTI)
    del capture.PerFrameFunctionalGroupsSequence, capture.SharedFunctionalGroupsSequence
    set_pixels(capture, np.zeros((30, 40, 48), int), bits=8, allocated=8)
    write(capture, folder / "sc")
    return expect(SCAN, counted={"not_ct_image": 1})


@case
def padding_declared_at_the_top(folder: Path) -> Expected:
    ds = enhanced(SCAN)
    hu = np.frombuffer(ds.PixelData, "<u2").reshape(SCAN.shape).astype(int) - 1024
    outside = np.zeros(SCAN.shape, bool)
    outside[:, :6], outside[:, :, :5] = True, True
    set_pixels(ds, np.where(outside, -2000, hu), bits=16, signed=1)
    ds.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0].RescaleIntercept = 0
    ds.add_new("PixelPaddingValue", "SS", -2000)
    write(ds, folder / "e")
    return expect(SCAN, invalid=outside)


@case
def classic_object_of_many_frames_without_groups(folder: Path) -> Expected:
    """CT Image Storage with NumberOfFrames: nothing says where the frames lie."""
    from conformance.dicom import series

    ds = series(SCAN)[0]
    stored = stored_of(ds)
    ds.NumberOfFrames = 26
    set_pixels(ds, np.stack([stored] * 26))
    write(ds, folder / "c")
    return refuse()
