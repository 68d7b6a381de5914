"""Which slices are of one series, where identities in the headers were changed, blanked or made anew.

A series UID is unique in the world and belongs to one patient and one study (PS3.3 C.7.3.1). So slices of one series
UID under several identities are one series if they make one stack only together. Single slices, each under a series
UID of its own, are one series if nothing else in their headers tells them apart and they make regular stacks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from maesil.errors import Refused
from maesil.ingest.header import InstanceHeader
from maesil.ingest.header_rows import kind_of
from maesil.ingest.passes import MIN_SLICES, SAME_POSITION_MM, along
from maesil.ingest.series import outcomes_of_series, plane_grids
from maesil.ingest.slices import NOT_WANTED
from maesil.ingest.source_path import SourcePlace, by_place
from maesil.ingest.stack import Outcome, SeriesRules, paths_of

Key = tuple[str, str, str]
"""Patient, study and series."""
_TOO_LITTLE = ("too_few_slices", "no_slice")
SLICES_WITH_A_COPY = 2
"""A series UID of one slice and its copy."""


class Headers(Protocol):
    """The headers of a scan, asked for in parts: no more is in memory than what belongs together."""

    def by_series(self) -> Iterable[dict[Key, list[InstanceHeader]]]:
        """Yield the slices of each series UID in order, by patient, study and series; blanked UIDs are left out."""

    def single_slices(self, planned: Planned) -> Iterable[list[InstanceHeader]]:
        """Yield the slices that are too little for a volume by patient, kind of image and scanner, in order."""

    def blank(self) -> Iterable[tuple[tuple[str, str], list[InstanceHeader]]]:
        """Yield the slices without a series UID by (patient, study), in order."""


@dataclass
class Planned:
    """What becomes of all slices of a scan."""

    outcomes: list[tuple[Key, Outcome]] = field(default_factory=list)
    patients: dict[str, str] = field(default_factory=dict)
    """Spellings of one patient: each to the one that stands for all of them."""

    def add(self, key: Key, outcomes: Iterable[Outcome]) -> None:
        """Note what becomes of parts of a series."""
        self.outcomes += [(key, outcome) for outcome in outcomes]

    def drop(self, keys: Collection[Key]) -> None:
        """Forget what was noted of these series."""
        self.outcomes = [(key, outcome) for key, outcome in self.outcomes if key not in keys]

    def same_patient(self, names: Iterable[str]) -> None:
        """Note that these are names of one patient; the first in order, blank ones last, stands for all."""
        found = {self.patients.get(name, name) for name in names}
        first = min(found, key=_blank_last)
        for name, stands in list(self.patients.items()):
            if stands in found:
                self.patients[name] = first
        self.patients |= dict.fromkeys(found, first)


class Listed:
    """The headers of a small scan, in memory."""

    def __init__(self, instances: Sequence[InstanceHeader]) -> None:
        self._instances = instances

    def by_series(self) -> Iterator[dict[Key, list[InstanceHeader]]]:
        """See `Headers.by_series`."""
        for _, owners in sorted(group_series(self._instances).items()):
            yield owners

    def single_slices(self, planned: Planned) -> Iterator[list[InstanceHeader]]:
        """See `Headers.single_slices`."""
        little = {key for key, outcome in planned.outcomes if is_too_little(outcome)}
        counts = Counter(_key(header) for header in self._instances)
        groups: dict[tuple[str, str], list[InstanceHeader]] = defaultdict(list)
        for header in self._instances:
            if _key(header) in little and counts[_key(header)] <= SLICES_WITH_A_COPY:
                groups[repr(header.patient), kind_of(header)].append(header)
        for _, group in sorted(groups.items()):
            yield group

    def blank(self) -> Iterator[tuple[tuple[str, str], list[InstanceHeader]]]:
        """See `Headers.blank`."""
        studies: dict[tuple[str, str], list[InstanceHeader]] = defaultdict(list)
        for header in self._instances:
            if not header.series:
                studies[header.patient, header.study].append(header)
        yield from sorted(studies.items())


def is_too_little(outcome: Outcome) -> bool:
    """Return whether a part of a series was left out for having too few slices."""
    return outcome.refusal is not None and outcome.refusal.code in _TOO_LITTLE


def outcomes_of_all(
    instances: Sequence[InstanceHeader] | Headers, rules: SeriesRules | None = None, planned: Planned | None = None
) -> Planned:
    """Split all slices of a scan into series and test every part of each; noted in ``planned`` where it is given."""
    rules, planned = rules or SeriesRules(), planned or Planned()
    headers = Listed(instances) if isinstance(instances, Sequence) else instances
    for owners in headers.by_series():
        apart = [(key, outcomes_of_series(part, rules)) for key, part in sorted(owners.items())]
        flat = [outcome for _, outcomes in apart for outcome in outcomes]
        together = _together(owners, flat, rules) if len(owners) > 1 else None
        if together is None:
            for key, outcomes in apart:
                planned.add(key, outcomes)
        else:
            patients = sorted({patient for patient, _, _ in owners}, key=_blank_last)
            planned.same_patient(patients)
            planned.add((patients[0], *min(owners)[1:]), together)
    _reunite_single_slices(planned, headers, rules)
    for (patient, study), slices in headers.blank():
        planned.add((patient, study, ""), _outcomes_of_blank_study(slices, rules))
    return planned


def _blank_last(name: str) -> tuple[bool, str]:
    return not name, name


def group_series(instances: Iterable[InstanceHeader]) -> dict[str, dict[Key, list[InstanceHeader]]]:
    """Group instances by series UID, and those by patient, study and series; blanked series UIDs are left out."""
    groups: dict[str, dict[Key, list[InstanceHeader]]] = defaultdict(lambda: defaultdict(list))
    for header in instances:
        if header.series:
            groups[header.series][_key(header)].append(header)
    return {series: dict(owners) for series, owners in groups.items()}


# One series UID under several identities ------------------------------------------------------------


def _together(
    owners: dict[Key, list[InstanceHeader]], apart: list[Outcome], rules: SeriesRules
) -> list[Outcome] | None:
    """Return the outcomes of the slices of all owners as one series; None where each has a series of its own."""
    slices = [header for part in owners.values() for header in part]
    shared, runs = _how_they_lie(owners)
    if shared >= min(map(len, owners.values())):
        return None
    together = outcomes_of_series(slices, rules)
    one_scan = _complete(together) and (_mixed(together) or not _complete(apart))
    if not one_scan and (shared or _complete(apart)):
        return None
    if runs > 2 * len(owners) and _complete(apart):
        text = f"{len(owners)} patients or studies under one series UID, whose slices lie between one another"
        refusal = Refused("several_owners", f"{text}: one scan or several is not known", slices=len(slices))
        return [Outcome(paths_of(slices), refusal=refusal)]
    note = "patient_id_varies" if len({patient for patient, _, _ in owners}) > 1 else "study_uid_varies"
    return [_noted(outcome, note) for outcome in together]


def _how_they_lie(owners: dict[Key, list[InstanceHeader]]) -> tuple[int, int]:
    """Return how many slices share their place with another owner's, and in how many runs the owners take turns."""
    of = {id(header): n for n, part in enumerate(owners.values()) for header in part}
    placed = [h for part in owners.values() for h in part if h.position and h.orientation and h.pixel_spacing]
    shared = runs = 0
    for plane in plane_grids(placed):
        places = along(plane)
        order = np.argsort(places, kind="stable")
        changes = np.diff([of[id(plane[i])] for i in order]) != 0
        shared += int((changes & (np.diff(places[order]) <= SAME_POSITION_MM)).sum())
        runs = max(runs, 1 + int(changes.sum()))
    return shared, runs


def _mixed(outcomes: Iterable[Outcome]) -> bool:
    """Return whether a stack holds slices of several owners."""
    stacks = [outcome.stack for outcome in outcomes if outcome.stack]
    return any(len({(h.patient, h.study) for h in stack.slices if h}) > 1 for stack in stacks)


# Single slices, each under a series UID of its own --------------------------------------------------


def _reunite_single_slices(planned: Planned, headers: Headers, rules: SeriesRules) -> None:
    """Replace the outcomes of single slices that belong together by those of the whole."""
    for group in headers.single_slices(planned):
        for alike in _alike(group):
            if len(alike) < MIN_SLICES:
                continue
            together = outcomes_of_series(alike, rules)
            if not _complete(together) and not _look_like_one(alike, together):
                continue
            key = (alike[0].patient, min(header.study for header in alike), min(header.series for header in alike))
            planned.drop({_key(header) for header in alike})
            planned.add(key, _reunited(alike, together))


def _look_like_one(alike: list[InstanceHeader], together: list[Outcome]) -> bool:
    """Return whether slices that make no volume had one series UID once: that of a series number.

    Single images during an intervention are series of their own, each with its number.
    """
    numbers = {header.said("SeriesNumber") for header in alike}
    return len(numbers) == 1 and any(outcome.status == "quarantined" for outcome in together)


def _reunited(alike: list[InstanceHeader], together: list[Outcome]) -> list[Outcome]:
    if _complete(together):
        return [_noted(outcome, "series_reunited") for outcome in together]
    why = next(outcome.refusal for outcome in together if outcome.status == "quarantined")
    text = (
        f"{len(alike)} images of one patient and scanner, each under a series UID of its own, look like one "
        f"series whose UID was made anew for each file, and make no regular stack ({why}); restore the series UIDs"
    )
    return [Outcome(paths_of(alike), refusal=Refused("scattered_series", text, slices=len(alike)))]


def _alike(group: list[InstanceHeader]) -> list[list[InstanceHeader]]:
    """Return slices of one patient, kind of image and scanner by what else they share: plane grid, frame, number.

    A frame of reference or a study UID of its own for each slice was made anew too, and says nothing.
    """
    found = []
    placed = [header for header in group if header.orientation and header.pixel_spacing]
    planes = [
        *plane_grids(placed),
        [header for header in group if not (header.orientation and header.pixel_spacing)],
    ]
    for plane in planes:
        anew = len({header.frame_of_reference for header in plane}) == len(plane) > 1
        frames: dict[str, list[InstanceHeader]] = defaultdict(list)
        for header in plane:
            frames["" if anew else header.frame_of_reference or header.study].append(header)
        for _, frame in sorted(frames.items()):
            found += _by_series_number(frame)
    return found


def _by_series_number(slices: list[InstanceHeader]) -> list[list[InstanceHeader]]:
    """Return the slices of each series number that has enough of them, and those of all others together."""
    numbers: dict[str, list[InstanceHeader]] = defaultdict(list)
    for header in slices:
        numbers[header.said("SeriesNumber")].append(header)
    whole = [same for _, same in sorted(numbers.items()) if len(same) >= MIN_SLICES]
    return [*whole, [header for same in numbers.values() if len(same) < MIN_SLICES for header in same]]


def _key(header: InstanceHeader) -> Key:
    return header.patient, header.study, header.series


# Blanked series UIDs --------------------------------------------------------------------------------


def _outcomes_of_blank_study(slices: list[InstanceHeader], rules: SeriesRules) -> list[Outcome]:
    """Split and test the slices of a study whose series UIDs an anonymiser blanked.

    A folder stands in for the series, since two scans must never be mixed. But where slices of one folder are refused
    or left over alone, and together with those of other folders they make whole volumes, they belong together.
    """
    folders: dict[SourcePlace, list[InstanceHeader]] = defaultdict(list)
    for header in slices:
        folders[header.path.parent].append(header)
    ordered = sorted(folders.items(), key=lambda found: by_place(found[0]))
    outcomes = [o for _, part in ordered for o in outcomes_of_series(part, rules)]
    if len(folders) > 1 and not _complete(outcomes):
        together = outcomes_of_series([header for part in folders.values() for header in part], rules)
        outcomes = together if _complete(together) else outcomes
    return outcomes


def _complete(outcomes: Iterable[Outcome]) -> bool:
    """Return whether nothing of a series was refused or too little for a volume."""
    return all(o.stack or (o.refusal and o.refusal.code in (*NOT_WANTED, "duplicate_slice")) for o in outcomes)


def _noted(outcome: Outcome, note: str) -> Outcome:
    if outcome.stack is None:
        return outcome
    return replace(outcome, stack=replace(outcome.stack, notes=(*outcome.stack.notes, note)))
