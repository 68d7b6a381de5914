"""From sources to a plan: what every use of scans begins with, before any voxel is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maesil.ingest.compare import comparing
from maesil.ingest.options import IngestOptions
from maesil.ingest.plan import Plan, make_plan
from maesil.ingest.scan import scan
from maesil.ingest.source_path import SourcePath, SourcePlace
from maesil.ingest.stack import SeriesRules
from maesil.ingest.verdict import FileVerdict
from maesil.progress import Report
from maesil.store.recipe import Recipe
from maesil.store.store import ZARR_DOCUMENT
from maesil.text import candidates, counted, printable


def scan_and_plan(sources: Sequence[SourcePlace], recipe: Recipe, options: IngestOptions, progress: Report) -> Plan:
    """Return the plan of all that lies at or below the sources; stages are ``scan`` and ``compare``."""
    looked_at = 0

    def on_file(path: SourcePath) -> None:
        nonlocal looked_at
        looked_at += 1
        progress("scan", looked_at, None)

    found = scan(sources, on_file, follow_links=options.follow_links)
    with comparing(options, progress) as digests:
        accepted = ("stand_ins" in recipe.accept, "material_map" in recipe.accept)
        rules = SeriesRules(recipe.include_derived, recipe.fill_gaps, *accepted, digests)
        return make_plan(found, rules, prefer_form=recipe.prefer_form)


def nothing_found(sources: Sequence[SourcePlace], plan: Plan) -> str:
    """Say what was found where no file is CT."""
    where = candidates([str(source) for source in sources])
    codes = sorted({verdict.code for verdict in plan.verdicts})
    found = f"{counted(len(plan.verdicts), 'file')} and none of them CT ({', '.join(codes)})" if codes else "no file"
    if not codes and any(map(_holds_zarr, sources)):
        found = "Zarr folders only, which are not looked into"
    reasons = [verdict for verdict in _loudest_first(plan.verdicts) if verdict.detail and verdict.code != "archive"]
    told = next((f"; {printable(verdict.path.name)}: {verdict.detail}" for verdict in reasons), "")
    told = told or "; name the folder that holds the scans"
    return f"{where}: expected DICOM or NIfTI files with CT, found {found}{told}"


def _holds_zarr(source: SourcePlace) -> bool:
    return isinstance(source, Path) and source.is_dir() and any(source.rglob(ZARR_DOCUMENT))


def _loudest_first(verdicts: Sequence[FileVerdict]) -> list[FileVerdict]:
    return sorted(verdicts, key=lambda verdict: verdict.status == "ignored")
