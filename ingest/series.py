"""From DICOM headers to stacks of slices: split first, then test each part.

Positions and orientations alone decide (principle: geometry is never invented): InstanceNumber, SliceLocation,
SpacingBetweenSlices, file names and folders do not. What fails a test is refused with its numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from maesil.errors import Refused
from maesil.ingest.header import InstanceHeader
from maesil.ingest.material import material_named
from maesil.ingest.passes import MIN_SLICES, Pass, Positions, along, by_header, interleaved, told_apart
from maesil.ingest.slice_places import cut_at_jumps, is_time_series, place_numbers, side_by_side
from maesil.ingest.slices import NOT_WANTED, check_slice, has_no_place
from maesil.ingest.stack import Outcome, SeriesRules, outcome_of_stack, paths_of
from maesil.ingest.verdict import Status
from maesil.text import counted

_SEPARATE_SCANS_MM = 100.0
_ORIENTATION_TOLERANCE = 1e-3
_BY_HEADER_AND_PLACE = ("gap", "irregular_spacing", "drift")
"""Refusals of a stack that may be several, one behind the other."""


def outcomes_of_series(slices: Sequence[InstanceHeader], rules: SeriesRules | None = None) -> list[Outcome]:
    """Split the slices of one series and test every part."""
    rules = rules or SeriesRules()
    if len(slices) < MIN_SLICES and all(has_no_place(header) and header.frames == 1 for header in slices):
        refusal = Refused("no_slice", "images without a place in the patient: pages, no volume")
        return [Outcome(paths_of(slices), refusal=refusal, status="skipped")]
    outcomes, wanted = _checked(slices, rules)
    if any(o.status == "quarantined" for o in outcomes):
        # A slice without geometry belongs somewhere in this series: what is left may have a hole.
        return outcomes + _quarantine_rest(wanted, outcomes)
    parts = _split(wanted)
    frames = len({part[0].frame_of_reference for _, part in parts}) > 1
    for label, part in parts:
        if frames and len(part) < MIN_SLICES:
            outcomes.append(_fragment(label, part, wanted))
        else:
            outcomes.extend(_outcomes_of_part(label, part, rules))
    return outcomes


def _fragment(label: str, part: list[InstanceHeader], wanted: list[InstanceHeader]) -> Outcome:
    text = f"{counted(len(part), 'slice')} of {len(wanted)} in a frame of reference apart from the rest of the series"
    refusal = Refused("frame_of_reference", f"{text}: where they lie beside the others is not known", slices=len(part))
    return Outcome(paths_of(part), refusal=refusal, label=label)


def _checked(slices: Iterable[InstanceHeader], rules: SeriesRules) -> tuple[list[Outcome], list[InstanceHeader]]:
    """Return what became of slices that cannot be part of a volume, and those that can."""
    refused: list[Outcome] = []
    wanted: list[InstanceHeader] = []
    for header in slices:
        try:
            check_slice(header, include_derived=rules.include_derived, material_maps=rules.accept_material_maps)
            wanted.append(_noted(header))
        except Refused as refusal:
            status: Status = "skipped" if refusal.code in NOT_WANTED else "quarantined"
            refused.append(Outcome((header.path,), refusal=refusal, status=status))
    return _merge_refusals(refused), wanted


def _noted(header: InstanceHeader) -> InstanceHeader:
    """Return a wanted header with a remark on what it is taken as, against what it says."""
    if material_named(header) is None:
        return header
    return replace(header, remarks=(*header.remarks, "accepted_material_map"))


def _merge_refusals(outcomes: list[Outcome]) -> list[Outcome]:
    """One outcome per code, rather than one per slice."""
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


def _split(slices: Sequence[InstanceHeader]) -> list[tuple[str, list[InstanceHeader]]]:
    """Split by matrix, in-plane spacing, orientation and frame of reference; label the parts when there are several."""
    planes = plane_grids(slices)
    parts = [("" if len(planes) == 1 else _plane_label(plane[0]), plane) for plane in planes]
    frames = [(label, frame) for label, plane in parts for frame in _frames_of_reference(plane)]
    if len(frames) == len(parts):
        return parts
    return [(f"{label} frame {frame[0].frame_of_reference}".strip(), frame) for label, frame in frames]


def plane_grids(slices: Iterable[InstanceHeader]) -> list[list[InstanceHeader]]:
    """Return slices by the grid of their plane: matrix, in-plane spacing, orientation."""
    parts: list[list[InstanceHeader]] = []
    for header in slices:
        for part in parts:
            if _same_plane_grid(part[0], header):
                part.append(header)
                break
        else:
            parts.append([header])
    return parts


def _frames_of_reference(slices: list[InstanceHeader]) -> list[list[InstanceHeader]]:
    """Return slices by their frame of reference: positions of two cannot be compared.

    A UID of its own for each slice is an anonymiser's and says nothing; nor does none.
    """
    said: dict[str, list[InstanceHeader]] = defaultdict(list)
    for header in slices:
        said[header.frame_of_reference].append(header)
    named = len(said) - ("" in said)
    if named < 2 or named == len(slices):
        return [slices]
    return [frame for _, frame in sorted(said.items())]


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
    if len(part) < MIN_SLICES or is_time_series(part):
        return [_no_volume(label, part)]
    if stacks := side_by_side(part):
        return _outcomes_of_passes(label, stacks, rules)
    try:
        positions = Positions(part, rules.digests)
        passes = told_apart(part, positions) if positions.conflicts else interleaved(positions.slices)
    except Refused as refusal:
        return [Outcome(paths_of(part), refusal=refusal, label=label)]
    if positions.conflicts:  # copies are looked for within each pass: two phases may share a slice of air
        return _outcomes_of_passes(label, _named(passes), rules)
    outcomes = []
    if positions.copies:
        reason = Refused("duplicate_slice", "the same pixels at the same position as another file of the series")
        outcomes.append(Outcome(paths_of(positions.copies), refusal=reason, status="skipped"))
    if passes:
        return outcomes + _outcomes_of_passes(label, _named(passes), rules)
    return outcomes + _outcomes_of_places(label, positions.slices, rules)


def _no_volume(label: str, part: list[InstanceHeader]) -> Outcome:
    places = int(place_numbers(part).max()) + 1
    if len(part) >= MIN_SLICES:
        text = f"{counted(len(part), 'image')} over time of {_places(places)}: bolus tracking or perfusion, no volume"
        refusal = Refused("time_series", text)
    else:
        at = "" if places == len(part) else f" of {_places(places)}"
        text = f"expected at least {MIN_SLICES} slices, found {len(part)}{at}"
        refusal = Refused("too_few_slices", text, slices=len(part))
    return Outcome(paths_of(part), refusal=refusal, status="skipped", label=label)


def _places(count: int) -> str:
    return "one place" if count == 1 else f"{count} places"


def _outcomes_of_places(label: str, slices: list[InstanceHeader], rules: SeriesRules) -> list[Outcome]:
    """Test slices in the order of their positions, each at its own: as one stack or as several behind one another."""
    blocks = _separate_scans(slices)
    outcomes = []
    for number, block in enumerate(blocks):
        block_label = f"{label} block {number}".strip() if len(blocks) > 1 else label
        outcomes.append(outcome_of_stack(block_label, block, rules))
    if any(outcome.refusal and outcome.refusal.code in _BY_HEADER_AND_PLACE for outcome in outcomes):
        for passes in _behind_one_another(slices):
            apart = [outcome_of_stack(f"{label} {name}".strip(), part, rules) for name, part in passes]
            if all(outcome.stack for outcome in apart):
                return apart
    return outcomes


def _behind_one_another(slices: list[InstanceHeader]) -> Iterator[list[Pass]]:
    """Yield the ways in which several acquisitions may make what is no one stack: by header, then by place."""
    for passes in (*map(_named, by_header(slices)), cut_at_jumps(slices)):
        if len(passes) > 1 and all(len(part) >= MIN_SLICES for _, part in passes):
            places = {id(header): n for n, header in enumerate(slices)}
            yield [(name, sorted(part, key=lambda header: places[id(header)])) for name, part in passes]


def _named(passes: Iterable[Pass]) -> list[Pass]:
    return [(f"acquisition {name}".strip(), part) for name, part in passes]


def _outcomes_of_passes(label: str, passes: Iterable[Pass], rules: SeriesRules) -> list[Outcome]:
    return [
        outcome for name, slices in passes for outcome in _outcomes_of_part(f"{label} {name}".strip(), slices, rules)
    ]


def _separate_scans(slices: list[InstanceHeader]) -> list[list[InstanceHeader]]:
    """Cut where two blocks lie so far apart that they are two scans and no slice is missing between them."""
    gaps = np.diff(along(slices))
    if not len(gaps):
        return [slices]
    cuts = np.nonzero((gaps >= _SEPARATE_SCANS_MM) & (gaps > 10 * np.median(gaps)))[0] + 1
    return [list(slices[a:b]) for a, b in zip([0, *cuts], [*cuts, len(slices)], strict=True)]
