"""From DICOM headers to stacks of slices: split first, then test each part.

Positions and orientations alone decide (principle: geometry is never invented): InstanceNumber, SliceLocation,
SpacingBetweenSlices, file names and folders do not. What fails a test is refused with its numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maesil.errors import Refused
from maesil.geometry import Affine, from_dicom
from maesil.ingest.header import InstanceHeader
from maesil.ingest.limits import MAX_EDGE, MAX_SPACING_MM, MIN_SPACING_MM, check_voxels
from maesil.ingest.passes import (
    MIN_SLICES,
    Pass,
    along,
    by_position,
    interleaved,
    normal_of,
    told_apart,
    uneven,
    unit,
)

_DRIFT_MM = 0.1
_AXIAL_DRIFT = 0.1
_SEPARATE_SCANS_MM = 100.0
_ORIENTATION_TOLERANCE = 1e-3
_NOT_AXIAL_BELOW = 0.8
_DERIVED_CONTRAST = {
    "MAXIMUM",
    "MINIMUM",
    "MEAN",
    "STD_DEVIATION",
    "SUBTRACTION",
    "MASKED",
    "DIVISION",
    "MULTIPLICATION",
}
"""What Enhanced CT says in the fourth value of a frame's type (PS3.3 C.8.16.1.4): no slices of their own."""
_REFORMAT_WORDS = ("MPR", "REFORMAT", "MIP", "MINIP", "PROJECTION", "VOLUME RENDERING", "VRT", "SCREEN")
_NOT_WANTED = ("localizer", "derived_reformat", "no_slice")


@dataclass(frozen=True)
class SeriesRules:
    """What a user accepts beyond what is safe."""

    include_derived: bool = False
    """Take reformats too."""
    fill_gaps: int = 0
    """How many slices in a row may be missing: they are interpolated, and marked not valid."""


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

    paths: tuple[Path, ...]
    stack: Stack | None = None
    refusal: Refused | None = None
    status: str = "quarantined"
    label: str = ""
    """What told this part apart from the rest of its series; empty when nothing was split."""


def outcomes_of_series(slices: Sequence[InstanceHeader], rules: SeriesRules | None = None) -> list[Outcome]:
    """Split the slices of one series and test every part."""
    rules = rules or SeriesRules()
    outcomes: list[Outcome] = []
    wanted: list[InstanceHeader] = []
    for header in slices:
        try:
            _check_slice(header, rules)
            wanted.append(header)
        except Refused as refusal:
            status = "skipped" if refusal.code in _NOT_WANTED else "quarantined"
            outcomes.append(Outcome((header.path,), refusal=refusal, status=status))
    outcomes = _merge_refusals(outcomes)
    if any(o.status == "quarantined" for o in outcomes):
        # A slice without geometry belongs somewhere in this series: what is left may have a hole.
        return outcomes + _quarantine_rest(wanted, outcomes)
    for label, part in _split(wanted):
        outcomes.extend(_outcomes_of_part(label, part, rules))
    return outcomes


def _check_slice(header: InstanceHeader, rules: SeriesRules) -> None:
    if "LOCALIZER" in header.image_type:
        raise Refused("localizer", "a scout view")
    if not rules.include_derived and _is_reformat(header.image_type):
        raise Refused("derived_reformat", f"ImageType {'/'.join(header.image_type)}")
    for name, value in (
        ("ImagePositionPatient", header.position),
        ("ImageOrientationPatient", header.orientation),
        ("PixelSpacing", header.pixel_spacing),
    ):
        if value is None:
            if header.position is None and header.orientation is None and "SECONDARY" in header.image_type:
                raise Refused("no_slice", "a secondary image without a place in the patient: a page beside the slices")
            raise Refused("no_geometry", f"expected {name}, found none or not all of its numbers")
    assert header.orientation is not None and header.pixel_spacing is not None
    if not (0 < header.rows <= MAX_EDGE and 0 < header.columns <= MAX_EDGE):
        found = f"{header.rows} x {header.columns}"
        raise Refused("size_limit", f"expected 1 to {MAX_EDGE} rows and columns, found {found}")
    if not all(MIN_SPACING_MM < mm < MAX_SPACING_MM for mm in header.pixel_spacing):
        expected = f"a PixelSpacing of {MIN_SPACING_MM} to {MAX_SPACING_MM:g} mm"
        raise Refused("bad_spacing", f"expected {expected}, found {header.pixel_spacing}")
    row, column = np.asarray(header.orientation[:3]), np.asarray(header.orientation[3:])
    lengths = np.linalg.norm([row, column, np.cross(row, column)], axis=1)
    if (np.abs(lengths - 1) > 0.01).any():
        raise Refused("bad_orientation", f"expected two unit vectors at a right angle, found {header.orientation}")
    if not rules.include_derived and "DERIVED" in header.image_type and abs(normal_of(header)[2]) < _NOT_AXIAL_BELOW:
        raise Refused("derived_reformat", "derived, and not axial")


def _is_reformat(image_type: tuple[str, ...]) -> bool:
    derived = "DERIVED" in image_type and not _DERIVED_CONTRAST.isdisjoint(image_type)
    return derived or any(word in value for value in image_type for word in _REFORMAT_WORDS)


def _merge_refusals(outcomes: list[Outcome]) -> list[Outcome]:
    """One outcome a code, rather than one a slice."""
    by_code: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_code[outcome.refusal.code if outcome.refusal else ""].append(outcome)
    return [
        Outcome(tuple(p for o in same for p in o.paths), refusal=same[0].refusal, status=same[0].status)
        for same in by_code.values()
    ]


def _quarantine_rest(wanted: list[InstanceHeader], outcomes: list[Outcome]) -> list[Outcome]:
    if not wanted:
        return []
    reason = next(o.refusal for o in outcomes if o.status == "quarantined")
    assert reason is not None
    refusal = Refused("incomplete_series", f"slices of the same series were refused ({reason})", left=len(wanted))
    return [Outcome(tuple(header.path for header in wanted), refusal=refusal)]


def _split(slices: Iterable[InstanceHeader]) -> list[tuple[str, list[InstanceHeader]]]:
    """Split by matrix, in-plane spacing and orientation; label the parts when there are several."""
    parts: list[list[InstanceHeader]] = []
    for header in slices:
        for part in parts:
            if _same_plane_grid(part[0], header):
                part.append(header)
                break
        else:
            parts.append([header])
    if len(parts) == 1:
        return [("", parts[0])]
    return [(_plane_label(part[0]), part) for part in parts]


def _same_plane_grid(a: InstanceHeader, b: InstanceHeader) -> bool:
    assert a.orientation and b.orientation and a.pixel_spacing and b.pixel_spacing
    return (
        (a.rows, a.columns) == (b.rows, b.columns)
        and np.allclose(a.orientation, b.orientation, rtol=0, atol=_ORIENTATION_TOLERANCE)
        and np.allclose(a.pixel_spacing, b.pixel_spacing, rtol=1e-4, atol=0)
    )


def _plane_label(header: InstanceHeader) -> str:
    assert header.orientation and header.pixel_spacing
    cosines = ",".join(f"{value:.3f}" for value in header.orientation)
    return f"plane {header.rows}x{header.columns} {header.pixel_spacing[0]:.4f},{header.pixel_spacing[1]:.4f} {cosines}"


def _outcomes_of_part(label: str, part: list[InstanceHeader], rules: SeriesRules) -> list[Outcome]:
    try:
        positions = by_position(part)
        passes = told_apart(part, positions) if positions.conflicts else interleaved(positions.slices)
    except Refused as refusal:
        return [Outcome(_paths(part), refusal=refusal, label=label)]
    outcomes = []
    if positions.conflicts:  # copies are looked for within each pass: two phases may share a slice of air
        return _outcomes_of_passes(label, passes, rules)
    if positions.copies:
        reason = Refused("duplicate_slice", "the same pixels at the same position as another file of the series")
        outcomes.append(Outcome(_paths(positions.copies), refusal=reason, status="skipped"))
    if passes:
        return outcomes + _outcomes_of_passes(label, passes, rules)
    blocks = _separate_scans(positions.slices)
    for number, block in enumerate(blocks):
        block_label = f"{label} block {number}".strip() if len(blocks) > 1 else label
        outcomes.append(_test_stack(block_label, block, rules))
    return outcomes


def _outcomes_of_passes(label: str, passes: Iterable[Pass], rules: SeriesRules) -> list[Outcome]:
    return [
        outcome
        for name, slices in passes
        for outcome in _outcomes_of_part(f"{label} acquisition {name}".strip(), slices, rules)
    ]


def _paths(slices: Iterable[InstanceHeader]) -> tuple[Path, ...]:
    """Return the files of slices, each once: frames share theirs."""
    return tuple(dict.fromkeys(header.path for header in slices))


def _separate_scans(slices: list[InstanceHeader]) -> list[list[InstanceHeader]]:
    """Cut where two blocks lie so far apart that they are two scans and no slice is missing between them."""
    gaps = np.diff(along(slices))
    if not len(gaps):
        return [slices]
    cuts = np.nonzero((gaps >= _SEPARATE_SCANS_MM) & (gaps > 10 * np.median(gaps)))[0] + 1
    return [list(slices[a:b]) for a, b in zip([0, *cuts], [*cuts, len(slices)], strict=True)]


def _test_stack(label: str, slices: list[InstanceHeader], rules: SeriesRules) -> Outcome:
    paths = _paths(slices)
    try:
        if len(slices) < MIN_SLICES:
            detail = f"expected at least {MIN_SLICES} slices, found {len(slices)}"
            refusal = Refused("too_few_slices", detail, slices=len(slices))
            return Outcome(paths, refusal=refusal, status="skipped", label=label)
        filled = _fill_gaps(slices, rules.fill_gaps)
        check_voxels((len(filled), slices[0].rows, slices[0].columns))
        affine = _regular_affine(filled)
    except Refused as refusal:
        return Outcome(paths, refusal=refusal, label=label)
    notes = [] if slices[0].series else ["blank_series_uid"]
    notes += ["split_from_series"] if label else []
    notes += ["gaps_filled"] if len(filled) > len(slices) else []
    notes += ["burned_in_annotation"] if any(header.burned_in for header in slices) else []
    notes += ["head"] if any(header.head for header in slices) else []
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


def _regular_affine(slices: Sequence[InstanceHeader | None]) -> Affine:
    """Return the affine of a stack whose slices lie at equal steps; `Refused` with the offending gaps otherwise."""
    there = [header for header in slices if header is not None]
    numbers = np.array([n for n, header in enumerate(slices) if header is not None])
    positions = np.asarray([header.position for header in there], dtype=np.float64)
    places = along(there)
    steps = np.diff(places) / np.diff(numbers)
    if uneven(steps).any():
        raise _gap_refusal(places, np.diff(places))
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    drift = positions - positions[0] - numbers[:, None] * step
    normal = normal_of(there[0])
    in_plane = float(np.linalg.norm(drift - np.outer(drift @ normal, normal), axis=1).max())
    axial = float(np.abs(drift @ normal).max())
    if in_plane > _DRIFT_MM or axial > max(_DRIFT_MM, _AXIAL_DRIFT * float(steps.mean())):
        text = f"slices stray {in_plane:.2f} mm in the plane and {axial:.2f} mm along the axis from a straight line"
        raise Refused("drift", text, in_plane_mm=in_plane, along_mm=axial, places_mm=_rounded(places))
    first = there[0]
    assert first.orientation and first.pixel_spacing
    cosines = [*unit(first.orientation[:3]), *unit(first.orientation[3:])]
    return from_dicom(tuple(positions[0]), tuple(step), cosines, first.pixel_spacing)


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


def group_series(instances: Iterable[InstanceHeader]) -> dict[tuple[str, str, str], list[InstanceHeader]]:
    """Group instances by patient, study and series; those whose series UID was blanked are left out."""
    groups: dict[tuple[str, str, str], list[InstanceHeader]] = defaultdict(list)
    for header in instances:
        if header.series:
            groups[header.patient, header.study, header.series].append(header)
    return dict(groups)


def outcomes_of_blank_series(
    instances: Iterable[InstanceHeader], rules: SeriesRules | None = None
) -> list[tuple[tuple[str, str, str], Outcome]]:
    """Split and test the instances whose series UID an anonymiser blanked; each outcome with (patient, study, "").

    A folder stands in for the series, since two scans must never be mixed. But where slices of one folder are refused
    or left over alone, and together with those of other folders they make whole volumes, they belong together.
    """
    studies: dict[tuple[str, str], dict[Path, list[InstanceHeader]]] = defaultdict(lambda: defaultdict(list))
    for header in instances:
        if not header.series:
            studies[header.patient, header.study][header.path.parent].append(header)
    found = []
    for (patient, study), folders in sorted(studies.items()):
        outcomes = [o for _, slices in sorted(folders.items()) for o in outcomes_of_series(slices, rules)]
        if len(folders) > 1 and not _complete(outcomes):
            together = outcomes_of_series([header for slices in folders.values() for header in slices], rules)
            outcomes = together if _complete(together) else outcomes
        found += [((patient, study, ""), outcome) for outcome in outcomes]
    return found


def _complete(outcomes: Iterable[Outcome]) -> bool:
    """Return whether nothing of a series was refused or too little for a volume."""
    return all(o.stack or (o.refusal and o.refusal.code in (*_NOT_WANTED, "duplicate_slice")) for o in outcomes)
