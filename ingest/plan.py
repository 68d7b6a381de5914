"""From what was found to what will be done: one plan a volume, one verdict for every other file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from maesil.errors import Refused
from maesil.ingest.nifti import Claim, image_of_pair
from maesil.ingest.reunite import Key, outcomes_of_all
from maesil.ingest.scan import ScanResult
from maesil.ingest.scanned import SCANNED_BYTES
from maesil.ingest.siblings import Siblings, missing_slices, stand_ins
from maesil.ingest.source import Source
from maesil.ingest.source_file import MAX_RATIO, file_on_disk, is_bomb, stamp_of
from maesil.ingest.source_path import SourcePath
from maesil.ingest.stack import Outcome, SeriesRules, Stack
from maesil.ingest.verdict import FileVerdict

STORED_BYTES = 2
"""A voxel takes as much in most files, before it is encoded."""


@dataclass(frozen=True)
class VolumePlan:
    """One volume to make. Identities stay in the driving process."""

    source: Source
    identity: str | None
    """Patient, study, series and what split it; None where only the content can tell (NIfTI, blanked UIDs)."""
    patient: str | None
    study: str = ""
    series: str = ""


@dataclass(frozen=True)
class RefusedSeries:
    """A part of a series that will not become a volume, for the store's quarantine."""

    identity: str
    refusal: Refused
    paths: tuple[SourcePath, ...]


@dataclass(frozen=True)
class LeftOut:
    """A part of a series that will not become a volume: a verdict on each file, a refusal where one is not trusted."""

    outcome: Outcome
    identity: str | None
    """None where it was understood and is not wanted."""

    def verdicts(self) -> list[FileVerdict]:
        """Return one verdict for each of its files."""
        outcome, refusal = self.outcome, self.outcome.refusal
        assert refusal is not None
        return [FileVerdict(p, outcome.status, refusal.code, detail=refusal.detail) for p in outcome.paths]

    def refused(self) -> RefusedSeries | None:
        """Return what the store's quarantine is told; None where it is told nothing."""
        assert self.outcome.refusal is not None
        if self.identity is None:
            return None
        return RefusedSeries(self.identity, self.outcome.refusal, self.outcome.paths)


class AnyPlan(Protocol):
    """All that follows from a scan before any pixel is decoded, wherever it is kept."""

    @property
    def volumes(self) -> Collection[VolumePlan]:
        """One plan for each volume."""

    @property
    def refused(self) -> Collection[RefusedSeries]:
        """What the store's quarantine is told."""

    @property
    def verdicts(self) -> Collection[FileVerdict]:
        """Verdicts on files that are no part of a volume."""

    @property
    def damaged_files(self) -> int:
        """Refused before it was known which series they belong to."""


@dataclass
class Plan:
    """The same in memory."""

    volumes: list[VolumePlan] = field(default_factory=list)
    refused: list[RefusedSeries] = field(default_factory=list)
    verdicts: list[FileVerdict] = field(default_factory=list)
    damaged_files: int = 0


def make_plan(scan: ScanResult, rules: SeriesRules | None = None, *, prefer_form: str = "") -> Plan:
    """Return the plan of everything a scan found; ``prefer_form`` decides where the two of a NIfTI file differ."""
    damaged = sum(verdict.status == "quarantined" for verdict in scan.verdicts)
    plan = Plan(verdicts=list(scan.verdicts), damaged_files=damaged)
    planned = outcomes_of_all(scan.instances, rules)
    beside = stand_ins(scan.verdicts)
    for key, outcome in planned.outcomes:
        decided = decided_on(key, outcome, beside, rules)
        if isinstance(decided, VolumePlan):
            plan.volumes.append(of_one_patient(decided, planned.patients))
            continue
        plan.verdicts += decided.verdicts()
        if (refused := decided.refused()) is not None:
            plan.refused.append(refused)
    for path in scan.niftis:
        plan.volumes += volumes_of_nifti(path, scan.claims[path], prefer_form)
    return plan


def volumes_of_nifti(path: SourcePath, claim: Claim, prefer_form: str) -> Iterator[VolumePlan]:
    """Yield the volumes of a NIfTI file: several of one file are one patient's, whoever that is."""
    image = image_of_pair(path)
    paths = (path,) if image is None else (path, image)
    several = claim.volumes > 1
    for number in range(claim.volumes):
        source = Source(
            "nifti",
            paths,
            planes=((0, number),) if several else (),
            notes=("one_of_several",) if several else (),
            decoded_bytes=claim.decoded_bytes,
            slice_bytes=claim.slice_bytes,
            prefer=prefer_form,
        )
        yield VolumePlan(source, identity=None, patient=f"file {path}" if several else None)


def decided_on(key: Key, outcome: Outcome, beside: Siblings, rules: SeriesRules | None) -> VolumePlan | LeftOut:
    """Return what is made of a part of a series; the patient of a volume as its own headers name him."""
    patient, study, series = key
    outcome = _doubted(outcome, beside, rules)
    identity = _identity(patient, study, series, outcome.label) if study and series else None
    source = None if outcome.stack is None else _slices_source(outcome.stack, outcome.paths)
    if source is not None and source.is_long and (doubt := _unpacks_to_more(source)) is not None:
        source, outcome = None, replace(outcome, stack=None, refusal=doubt)
    if source is not None:
        return VolumePlan(source, identity, patient, study, series)
    where = sorted(map(str, outcome.paths))[0]
    return LeftOut(outcome, (identity or f"{key} {where}") if outcome.status == "quarantined" else None)


def of_one_patient(plan: VolumePlan, patients: Mapping[str, str]) -> VolumePlan:
    """Return a plan under the name that stands for all spellings of its patient; None for a blank one."""
    if plan.source.kind == "nifti":
        return plan
    return replace(plan, patient=patients.get(plan.patient or "", plan.patient) or None)


def _doubted(outcome: Outcome, beside: Siblings, rules: SeriesRules | None) -> Outcome:
    """Return the outcome, refused or noted where files that hold no slice are named like its own."""
    doubt = missing_slices(outcome.paths, beside) if outcome.stack is not None else None
    if doubt is None or outcome.stack is None:
        return outcome
    if rules is None or not rules.accept_stand_ins:
        return replace(outcome, stack=None, refusal=doubt)
    return replace(outcome, stack=replace(outcome.stack, notes=(*outcome.stack.notes, "accepted_stand_ins")))


def _slices_source(stack: Stack, paths: tuple[SourcePath, ...]) -> Source:
    first = next(header for header in stack.slices if header is not None)
    technical = {"kind": "dicom", "transfer_syntax": first.transfer_syntax, **first.technical}
    if first.frame is not None:
        technical["enhanced"] = True
    number = {path: n for n, path in enumerate(paths)}
    planes = tuple(None if header is None else (number[header.path], header.frame) for header in stack.slices)
    slice_bytes = first.rows * first.columns * SCANNED_BYTES
    source = Source(
        "slices", paths, planes, stack.affine, stack.notes, technical, slice_bytes * len(planes), slice_bytes
    )
    if first.frame is None or not source.is_long:
        return source
    largest = max(stamp_of(path)[0] for path in paths)  # an object of many frames is read whole
    return replace(source, slice_bytes=max(slice_bytes, largest))


def _unpacks_to_more(source: Source) -> Refused | None:
    """Return the refusal of a long source whose files are too small for the voxels that they claim."""
    packed = sum(stamp_of(path)[0] for path in {file_on_disk(path) for path in source.paths})
    claimed = source.decoded_bytes // SCANNED_BYTES * STORED_BYTES
    if not is_bomb(packed, claimed):
        return None
    text = f"expected at most {MAX_RATIO} times as many bytes of voxels as of files, found {claimed} and {packed}"
    return Refused("size_limit", text)


def _identity(*parts: str) -> str:
    return "\0".join(parts)
