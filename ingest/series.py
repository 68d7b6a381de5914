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
from maesil.ingest.dicom import InstanceHeader, hu_digest

MIN_SLICES = 16
MAX_EDGE = 8192
MAX_VOXELS = 2**30

_SAME_POSITION_MM = 0.01
_GAP_TOLERANCE = 0.01
_GAP_TOLERANCE_MM = 0.002
_DRIFT_MM = 0.1
_SEPARATE_SCANS_MM = 100.0
_ORIENTATION_TOLERANCE = 1e-3
_NOT_AXIAL_BELOW = 0.8
_REFORMAT_WORDS = ("MPR", "REFORMAT", "MIP", "MINIP", "PROJECTION", "VOLUME RENDERING", "VRT", "SCREEN")


@dataclass(frozen=True)
class Stack:
    """Slices in the order of their positions that make one regular volume."""

    slices: tuple[InstanceHeader, ...]
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


def outcomes_of_series(slices: Sequence[InstanceHeader]) -> list[Outcome]:
    """Split the instances of one series and test every part (single-frame CT)."""
    outcomes: list[Outcome] = []
    wanted: list[InstanceHeader] = []
    for header in slices:
        try:
            _check_slice(header)
            wanted.append(header)
        except Refused as refusal:
            status = "skipped" if refusal.code in ("localizer", "derived_reformat") else "quarantined"
            outcomes.append(Outcome((header.path,), refusal=refusal, status=status))
    outcomes = _merge_refusals(outcomes)
    if any(o.status == "quarantined" for o in outcomes):
        # A slice without geometry belongs somewhere in this series: what is left may have a hole.
        return outcomes + _quarantine_rest(wanted, outcomes)
    for label, part in _split(wanted):
        outcomes.extend(_outcomes_of_part(label, part))
    return outcomes


def _check_slice(header: InstanceHeader) -> None:
    if "LOCALIZER" in header.image_type:
        raise Refused("localizer", "a scout view")
    if any(word in value for value in header.image_type for word in _REFORMAT_WORDS):
        raise Refused("derived_reformat", f"ImageType {'/'.join(header.image_type)}")
    for name, value in (
        ("ImagePositionPatient", header.position),
        ("ImageOrientationPatient", header.orientation),
        ("PixelSpacing", header.pixel_spacing),
    ):
        if value is None:
            raise Refused("no_geometry", f"expected {name}, found none or not all of its numbers")
    if not (0 < header.rows <= MAX_EDGE and 0 < header.columns <= MAX_EDGE):
        raise Refused(
            "size_limit", f"expected 1 to {MAX_EDGE} rows and columns, found {header.rows} x {header.columns}"
        )
    if header.pixel_spacing is not None and not all(0 < mm < 100 for mm in header.pixel_spacing):
        raise Refused("bad_spacing", f"expected a PixelSpacing above 0 mm, found {header.pixel_spacing}")
    normal = _normal(header)
    if abs(float(np.linalg.norm(normal)) - 1) > 0.01 or abs(_length(header, 0) - 1) > 0.01:
        raise Refused("bad_orientation", f"expected two unit vectors at a right angle, found {header.orientation}")
    if "DERIVED" in header.image_type and abs(normal[2]) < _NOT_AXIAL_BELOW:
        raise Refused("derived_reformat", "derived, and not axial")


def _length(header: InstanceHeader, at: int) -> float:
    assert header.orientation is not None
    return float(np.linalg.norm(header.orientation[at : at + 3]))


def _normal(header: InstanceHeader) -> NDArray[np.float64]:
    assert header.orientation is not None
    return np.cross(header.orientation[:3], header.orientation[3:])


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


def _outcomes_of_part(label: str, part: list[InstanceHeader]) -> list[Outcome]:
    paths = tuple(header.path for header in part)
    try:
        unique, duplicates, acquisitions = _resolve_same_positions(part)
    except Refused as refusal:
        return [Outcome(paths, refusal=refusal, label=label)]
    outcomes = []
    if duplicates:
        reason = Refused("duplicate_slice", "the same pixels at the same position as another file of the series")
        outcomes.append(Outcome(tuple(h.path for h in duplicates), refusal=reason, status="skipped"))
    if acquisitions:
        for name, slices in acquisitions:
            outcomes.extend(_outcomes_of_part(f"{label} acquisition {name}".strip(), slices))
        return outcomes
    blocks = _separate_scans(unique)
    for number, block in enumerate(blocks):
        block_label = f"{label} block {number}".strip() if len(blocks) > 1 else label
        outcomes.append(_test_stack(block_label, block))
    return outcomes


def _along(part: Sequence[InstanceHeader]) -> NDArray[np.float64]:
    """Return each slice's place (mm) along the normal of the first slice's plane."""
    return np.asarray([header.position for header in part], dtype=np.float64) @ _normal(part[0])


def _resolve_same_positions(
    part: list[InstanceHeader],
) -> tuple[list[InstanceHeader], list[InstanceHeader], list[tuple[str, list[InstanceHeader]]]]:
    """Return (slices sorted by position, duplicates, acquisitions when the part must be split by them instead)."""
    along = _along(part)
    order = np.argsort(along, kind="stable")
    ordered = [part[i] for i in order]
    together = np.split(np.arange(len(ordered)), np.nonzero(np.diff(along[order]) > _SAME_POSITION_MM)[0] + 1)
    if all(len(same) == 1 for same in together):
        return ordered, [], []
    kept: list[InstanceHeader] = []
    duplicates: list[InstanceHeader] = []
    for same in together:
        by_pixels: dict[bytes, InstanceHeader] = {}
        for i in same:
            digest = hu_digest(ordered[i].path) if len(same) > 1 else b""
            if digest in by_pixels:
                duplicates.append(ordered[i])
            else:
                by_pixels[digest] = ordered[i]
        kept.extend(by_pixels.values())
    if len(kept) == len(together):
        return kept, duplicates, []
    return kept, duplicates, _by_acquisition(kept)


def _by_acquisition(slices: list[InstanceHeader]) -> list[tuple[str, list[InstanceHeader]]]:
    acquisitions: dict[tuple[str, ...], list[InstanceHeader]] = defaultdict(list)
    for header in slices:
        acquisitions[header.acquisition].append(header)
    for same in acquisitions.values():
        if (np.diff(np.sort(_along(same))) <= _SAME_POSITION_MM).any():
            raise Refused(
                "position_conflict",
                "several slices at one position with different pixels, and nothing in the headers tells them apart",
                slices=len(slices),
            )
    return [("/".join(filter(None, key)), same) for key, same in sorted(acquisitions.items())]


def _separate_scans(slices: list[InstanceHeader]) -> list[list[InstanceHeader]]:
    """Cut where two blocks lie so far apart that they are two scans and no slice is missing between them."""
    gaps = np.diff(_along(slices))
    if not len(gaps):
        return [slices]
    cuts = np.nonzero((gaps >= _SEPARATE_SCANS_MM) & (gaps > 10 * np.median(gaps)))[0] + 1
    return [list(slices[a:b]) for a, b in zip([0, *cuts], [*cuts, len(slices)], strict=True)]


def _test_stack(label: str, slices: list[InstanceHeader]) -> Outcome:
    paths = tuple(header.path for header in slices)
    try:
        if len(slices) < MIN_SLICES:
            detail = f"expected at least {MIN_SLICES} slices, found {len(slices)}"
            refusal = Refused("too_few_slices", detail, slices=len(slices))
            return Outcome(paths, refusal=refusal, status="skipped", label=label)
        if slices[0].rows * slices[0].columns * len(slices) > MAX_VOXELS:
            raise Refused("size_limit", f"expected at most {MAX_VOXELS} voxels, found {len(slices)} slices")
        affine = _regular_affine(slices)
    except Refused as refusal:
        return Outcome(paths, refusal=refusal, label=label)
    notes = [] if slices[0].series else ["blank_series_uid"]
    notes += ["split_from_series"] if label else []
    return Outcome(paths, Stack(tuple(slices), affine, tuple(notes)), label=label)


def _regular_affine(slices: list[InstanceHeader]) -> Affine:
    """Return the affine of a stack whose slices lie at equal steps; `Refused` with the offending gaps otherwise."""
    positions = np.asarray([header.position for header in slices], dtype=np.float64)
    along = _along(slices)
    gaps = np.diff(along)
    mean_gap = float(gaps.mean())
    wrong = np.abs(gaps - mean_gap) > np.maximum(_GAP_TOLERANCE * mean_gap, _GAP_TOLERANCE_MM)
    if wrong.any():
        raise _gap_refusal(along, gaps)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    drift = positions - positions[0] - np.arange(len(slices))[:, None] * step
    if (worst := float(np.linalg.norm(drift, axis=1).max())) > max(_DRIFT_MM, 0.1 * mean_gap):
        raise Refused("drift", f"slices stray {worst:.2f} mm from a straight line", drift_mm=worst)
    first = slices[0]
    assert first.orientation and first.pixel_spacing
    return from_dicom(tuple(positions[0]), tuple(step), first.orientation, first.pixel_spacing)


def _gap_refusal(along: NDArray[np.float64], gaps: NDArray[np.float64]) -> Refused:
    usual = float(np.median(gaps))
    steps = gaps / usual
    holes = np.nonzero(steps > 1.5)[0]
    missing = np.rint(steps[holes]).astype(int) - 1
    if len(holes) and np.abs(steps - np.rint(steps)).max() < 0.05 and missing.sum() < len(gaps):
        places = [round(float(along[i]), 3) for i in holes]
        listed = ", ".join(f"{n} after {place} mm" for n, place in zip(missing, places, strict=True))
        numbers = {"after_mm": places, "missing": missing.tolist(), "spacing_mm": usual}
        return Refused("gap", f"slices are missing: {listed}; slices are {usual:.3f} mm apart", **numbers)
    low, high = float(gaps.min()), float(gaps.max())
    return Refused(
        "irregular_spacing", f"slices lie {low:.3f} to {high:.3f} mm apart", smallest_mm=low, largest_mm=high
    )


def group_series(instances: Iterable[InstanceHeader]) -> dict[tuple[str, ...], list[InstanceHeader]]:
    """Group instances by patient, study and series.

    Where an anonymiser blanked the series UID, the folder stands in for it: two scans must never be mixed.
    """
    groups: dict[tuple[str, ...], list[InstanceHeader]] = defaultdict(list)
    for header in instances:
        series = header.series or f"blank in {header.path.parent}"
        groups[header.patient, header.study, series].append(header)
    return dict(groups)
