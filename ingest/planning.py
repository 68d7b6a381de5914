"""From sources to a plan: what every use of scans begins with, before any voxel is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from maesil.ingest.compare import comparing
from maesil.ingest.options import IngestOptions
from maesil.ingest.passes import Digests
from maesil.ingest.plan import AnyPlan, Plan, make_plan
from maesil.ingest.plan_tables import PlanOnDisk
from maesil.ingest.scan import scan
from maesil.ingest.shared_scan import DAMAGED_ROWS, Say, SharedScan
from maesil.ingest.source_path import SourcePath, SourcePlace
from maesil.ingest.stack import SeriesRules
from maesil.ingest.tables import is_full
from maesil.ingest.verdict import FileVerdict
from maesil.progress import Report
from maesil.store.recipe import Recipe
from maesil.store.store import ZARR_DOCUMENT
from maesil.text import candidates, counted, printable


def planned_on_disk(
    sources: Sequence[SourcePlace], recipe: Recipe, options: IngestOptions, progress: Report, say: Say
) -> tuple[PlanOnDisk, SharedScan]:
    """Return the plan of all that lies at or below the sources, in tables on a disk, and the scan that it came from.

    Stages are ``list``, ``scan``, ``compare`` and ``plan``. Tables that turn out to be damaged are made once more.
    """
    shared = SharedScan(tuple(sources), options, progress, say)
    try:
        return _planned(shared, recipe), shared
    except DAMAGED_ROWS as error:
        if is_full(error):
            raise
        say(f"the tables of the scan are damaged ({printable(error)}): the sources are scanned anew")
        shared.discard()
        return _planned(shared, recipe), shared


def _planned(shared: SharedScan, recipe: Recipe) -> PlanOnDisk:
    tables = shared.tables()
    with comparing(shared.options, shared.progress) as digests:
        plan = PlanOnDisk(tables, _rules(recipe, digests))
        plan.make(recipe.prefer_form, shared.progress)
        return plan


def _rules(recipe: Recipe, digests: Digests) -> SeriesRules:
    accepted = ("stand_ins" in recipe.accept, "material_map" in recipe.accept)
    return SeriesRules(recipe.include_derived, recipe.fill_gaps, *accepted, digests)


def scan_and_plan(sources: Sequence[SourcePlace], recipe: Recipe, options: IngestOptions, progress: Report) -> Plan:
    """Return the plan of all that lies at or below the sources; stages are ``scan`` and ``compare``."""
    looked_at = 0

    def on_file(path: SourcePath) -> None:
        nonlocal looked_at
        looked_at += 1
        progress("scan", looked_at, None)

    found = scan(sources, on_file, follow_links=options.follow_links)
    with comparing(options, progress) as digests:
        return make_plan(found, _rules(recipe, digests), prefer_form=recipe.prefer_form)


def nothing_found(sources: Sequence[SourcePlace], plan: AnyPlan) -> str:
    """Say what was found where no file is CT."""
    where = candidates([str(source) for source in sources])
    codes, number = Counter(verdict.code for verdict in plan.verdicts), len(plan.verdicts)
    found = f"{counted(number, 'file')} and none of them CT ({', '.join(sorted(codes))})" if codes else "no file"
    if not codes and any(map(_holds_zarr, sources)):
        found = "Zarr folders only, which are not looked into"
    reason = _loudest(verdict for verdict in plan.verdicts if verdict.detail and verdict.code != "archive")
    told = f"; {printable(reason.path.name)}: {reason.detail}" if reason else "; name the folder that holds the scans"
    return f"{where}: expected DICOM or NIfTI files with CT, found {found}{told}"


def _holds_zarr(source: SourcePlace) -> bool:
    return isinstance(source, Path) and source.is_dir() and any(source.rglob(ZARR_DOCUMENT))


def _loudest(verdicts: Iterable[FileVerdict]) -> FileVerdict | None:
    """Return the first verdict on what might have been CT, else the first."""
    first = None
    for verdict in verdicts:
        if verdict.status != "ignored":
            return verdict
        first = first or verdict
    return first
