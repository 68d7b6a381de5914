"""From what was found to what will be done: one plan a volume, one verdict for every other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maesil.errors import Refused
from maesil.geometry import Affine
from maesil.ingest.dicom import ENHANCED_CT, InstanceHeader
from maesil.ingest.scan import ScanResult
from maesil.ingest.series import MAX_EDGE, MAX_VOXELS, MIN_SLICES, Outcome, Stack, group_series, outcomes_of_series
from maesil.ingest.verdict import FileVerdict


@dataclass(frozen=True)
class Source:
    """What a worker needs to read one volume; holds no identity."""

    kind: str
    """``slices``, ``enhanced`` or ``nifti``."""
    paths: tuple[Path, ...]
    affine: Affine | None = None
    """Of the stack of slices; the other kinds carry theirs in the file."""
    notes: tuple[str, ...] = ()
    technical: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What to call the source in messages: the file, or the folder of the first slice."""
        return str(self.paths[0] if len(self.paths) == 1 else self.paths[0].parent)


@dataclass(frozen=True)
class VolumePlan:
    """One volume to make. Identities stay in the driving process."""

    source: Source
    identity: str | None
    """Patient, study, series and what split it; None where only the content can tell (NIfTI, blanked UIDs)."""
    patient: str | None


@dataclass(frozen=True)
class RefusedSeries:
    """A part of a series that will not become a volume, for the store's quarantine."""

    identity: str
    refusal: Refused
    files: int


@dataclass
class Plan:
    """All that follows from a scan before any pixel is decoded."""

    volumes: list[VolumePlan] = field(default_factory=list)
    refused: list[RefusedSeries] = field(default_factory=list)
    verdicts: list[FileVerdict] = field(default_factory=list)


def make_plan(scan: ScanResult) -> Plan:
    """Return the plan of everything a scan found."""
    plan = Plan(verdicts=list(scan.verdicts))
    slices = [header for header in scan.instances if header.sop_class not in ENHANCED_CT]
    for key, headers in sorted(group_series(slices).items()):
        for outcome in outcomes_of_series(headers):
            _add(plan, key, headers, outcome)
    for header in scan.instances:
        if header.sop_class in ENHANCED_CT:
            _add_enhanced(plan, header)
    for path in scan.niftis:
        plan.volumes.append(VolumePlan(Source("nifti", (path,)), identity=None, patient=None))
    return plan


def _add(plan: Plan, key: tuple[str, ...], headers: Sequence[InstanceHeader], outcome: Outcome) -> None:
    patient, study, series = key
    identity = _identity(patient, study, series, outcome.label) if study and headers[0].series else None
    if outcome.stack is not None:
        source = _slices_source(outcome.stack)
        plan.volumes.append(VolumePlan(source, identity, patient or None))
        return
    refusal = outcome.refusal
    assert refusal is not None
    plan.verdicts.extend(FileVerdict(p, outcome.status, refusal.code, detail=refusal.detail) for p in outcome.paths)
    if outcome.status == "quarantined":
        plan.refused.append(RefusedSeries(identity or f"{key} {outcome.label}", refusal, len(outcome.paths)))


def _slices_source(stack: Stack) -> Source:
    first = stack.slices[0]
    technical = {"kind": "dicom", "transfer_syntax": first.transfer_syntax, **first.technical}
    return Source("slices", tuple(header.path for header in stack.slices), stack.affine, stack.notes, technical)


def _add_enhanced(plan: Plan, header: InstanceHeader) -> None:
    identity = _identity(header.patient, header.study, header.series, header.sop_instance)
    try:
        if "LOCALIZER" in header.image_type:
            plan.verdicts.append(FileVerdict(header.path, "skipped", "localizer"))
            return
        if not (0 < header.rows <= MAX_EDGE and 0 < header.columns <= MAX_EDGE) or (
            header.rows * header.columns * header.frames > MAX_VOXELS
        ):
            text = f"found {header.frames} frames of {header.rows} x {header.columns}"
            raise Refused("size_limit", f"expected at most {MAX_VOXELS} voxels, {text}")
        if header.frames < MIN_SLICES:
            detail = f"expected at least {MIN_SLICES} frames, found {header.frames}"
            plan.verdicts.append(FileVerdict(header.path, "skipped", "too_few_slices", detail=detail))
            return
    except Refused as refusal:
        plan.verdicts.append(FileVerdict(header.path, "quarantined", refusal.code, detail=refusal.detail))
        plan.refused.append(RefusedSeries(identity, refusal, 1))
        return
    plan.volumes.append(VolumePlan(Source("enhanced", (header.path,)), identity, header.patient or None))


def _identity(*parts: str) -> str:
    return "\0".join(parts)
