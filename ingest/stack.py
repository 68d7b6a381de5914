"""One stack of slices: whether it is regular, its affine, and what is noted or refused of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.geometry import Affine, from_dicom
from maesil.ingest.header import InstanceHeader
from maesil.ingest.limits import check_voxels
from maesil.ingest.passes import DRIFT_MM, MIN_SLICES, Digests, along, decoded_here, normal_of, uneven, unit
from maesil.ingest.source_path import SourcePath
from maesil.ingest.verdict import Status

_AXIAL_DRIFT = 0.1
_ROUNDED_MM, _ROUNDED_SHARE = 0.055, 0.25
"""Positions rounded to a tenth of a millimetre are 0.05 mm off at most; a missing slice moves one by half a step."""


@dataclass(frozen=True)
class SeriesRules:
    """What a user accepts beyond what is safe."""

    include_derived: bool = False
    """Take reformats too."""
    fill_gaps: int = 0
    """How many slices in a row may be missing: they are interpolated, and marked not valid."""
    accept_stand_ins: bool = False
    """Take scans beside whose slices lie files of the same names that hold none."""
    accept_material_maps: bool = False
    """Take what the header calls a map out of a multi-energy scan."""
    digests: Digests = decoded_here
    """How pixels are compared where headers do not decide."""


@dataclass(frozen=True)
class Stack:
    """Slices in the order of their positions that make one regular volume."""

    slices: tuple[InstanceHeader | None, ...]
    """None where a slice is missing and to be interpolated."""
    affine: Affine
    """Of the array ``[slice, row, column]``, to mm LPS; sheared when the gantry was tilted."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """One part of a series: a stack to read, or why there is none, and the files it concerns."""

    paths: tuple[SourcePath, ...]
    stack: Stack | None = None
    refusal: Refused | None = None
    status: Status = "quarantined"
    label: str = ""
    """What told this part apart from the rest of its series; empty when nothing was split."""


def paths_of(slices: Iterable[InstanceHeader]) -> tuple[SourcePath, ...]:
    """Return the files of slices, each once: frames share theirs."""
    return tuple(dict.fromkeys(header.path for header in slices))


def outcome_of_stack(label: str, slices: list[InstanceHeader], rules: SeriesRules) -> Outcome:
    """Test slices in the order of their positions: a regular stack, or why there is none."""
    paths = paths_of(slices)
    try:
        if len(slices) < MIN_SLICES:
            detail = f"expected at least {MIN_SLICES} slices, found {len(slices)}"
            refusal = Refused("too_few_slices", detail, slices=len(slices))
            return Outcome(paths, refusal=refusal, status="skipped", label=label)
        filled = _fill_gaps(slices, rules.fill_gaps)
        check_voxels((len(filled), slices[0].rows, slices[0].columns))
        affine, rounded = _regular_affine(filled)
    except Refused as refusal:
        return Outcome(paths, refusal=refusal, label=label)
    notes = [] if slices[0].series else ["blank_series_uid"]
    notes += ["split_from_series"] if label else []
    notes += ["gaps_filled"] if len(filled) > len(slices) else []
    notes += rounded + sorted({remark for header in slices for remark in header.remarks})
    return Outcome(paths, Stack(tuple(filled), affine, tuple(notes)), label=label)


def _fill_gaps(slices: list[InstanceHeader], most: int) -> list[InstanceHeader | None]:
    """Return the slices with None in each place where one is missing, if never more than ``most`` are in a row."""
    if not most:
        return list(slices)
    gaps = np.diff(along(slices))
    missing = np.rint(gaps / np.median(gaps)).astype(int) - 1
    if missing.min() < 0 or missing.max() > most:
        return list(slices)
    filled: list[InstanceHeader | None] = [slices[0]]
    for header, count in zip(slices[1:], missing, strict=True):
        filled += [None] * int(count) + [header]
    return filled


def _regular_affine(slices: Sequence[InstanceHeader | None]) -> tuple[Affine, list[str]]:
    """Return the affine of a stack whose slices lie at equal steps, and notes; `Refused` with the gaps otherwise."""
    there = [header for header in slices if header is not None]
    numbers = np.array([n for n, header in enumerate(slices) if header is not None])
    positions = np.asarray([header.position for header in there], dtype=np.float64)
    places = along(there)
    steps = np.diff(places) / np.diff(numbers)
    notes = []
    start, step = positions[0], (positions[-1] - positions[0]) / (len(slices) - 1)
    if uneven(steps).any():
        start, step = _straight_line(numbers, positions)
        strays = (positions - start - numbers[:, None] * step) @ normal_of(there[0])
        off = float(strays.max() - strays.min()) / 2
        start = start + (strays.max() - off) * normal_of(there[0])
        if off > min(_ROUNDED_MM, _ROUNDED_SHARE * float(steps.mean())) + 1e-6:
            raise _gap_refusal(places, np.diff(places))
        notes.append("positions_rounded")
    _check_drift(positions - start - numbers[:, None] * step, there[0], float(steps.mean()), places)
    first = there[0]
    assert first.orientation and first.pixel_spacing
    cosines = [*unit(first.orientation[:3]), *unit(first.orientation[3:])]
    return from_dicom(tuple(start), tuple(step), cosines, first.pixel_spacing), notes


def _straight_line(
    numbers: NDArray[np.int64], positions: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return start and step (mm) of the regular stack that lies closest to the positions."""
    design = np.stack([np.ones(len(numbers)), numbers], axis=1)
    (start, step), *_ = np.linalg.lstsq(design, positions, rcond=None)
    return start, step


def _check_drift(drift: NDArray[np.float64], first: InstanceHeader, gap: float, places: NDArray[np.float64]) -> None:
    normal = normal_of(first)
    in_plane = float(np.linalg.norm(drift - np.outer(drift @ normal, normal), axis=1).max())
    axial = float(np.abs(drift @ normal).max())
    if in_plane > DRIFT_MM or axial > max(DRIFT_MM, _AXIAL_DRIFT * gap):
        text = f"slices stray {in_plane:.2f} mm in the plane and {axial:.2f} mm along the axis from a straight line"
        raise Refused("drift", text, in_plane_mm=in_plane, along_mm=axial, places_mm=_rounded(places))


def _rounded(places: NDArray[np.float64]) -> list[float]:
    return [round(float(place), 3) for place in places]


def _gap_refusal(places: NDArray[np.float64], gaps: NDArray[np.float64]) -> Refused:
    usual = float(np.median(gaps))
    steps = gaps / usual
    holes = np.nonzero(steps > 1.5)[0]
    missing = np.rint(steps[holes]).astype(int) - 1
    numbers = {"spacing_mm": usual, "places_mm": _rounded(places)}
    if len(holes) and np.abs(steps - np.rint(steps)).max() < 0.05 and missing.sum() < len(gaps):
        after = _rounded(places[holes])
        listed = ", ".join(f"{n} after {place} mm" for n, place in zip(missing, after, strict=True))
        text = f"slices are missing: {listed}; slices are {usual:.3f} mm apart"
        return Refused("gap", text, after_mm=after, missing=missing.tolist(), **numbers)
    low, high = float(gaps.min()), float(gaps.max())
    text = f"slices lie {low:.3f} to {high:.3f} mm apart"
    return Refused("irregular_spacing", text, smallest_mm=low, largest_mm=high, **numbers)
