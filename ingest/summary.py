"""What an ingest did, for people (a table whose rows sum to the files found) and for programs (JSON)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from maesil.errors import NoInputError
from maesil.ingest.phi import PhiScan
from maesil.ingest.source_path import SourcePlace
from maesil.ingest.verdict import FileVerdict
from maesil.ingest.verdict_tables import Verdicts
from maesil.sizes import size_text
from maesil.store.records import Volume
from maesil.text import counted, printable

_EXPLANATIONS_SHOWN = 8


class NothingFound(NoInputError):
    """An ingest whose sources hold nothing that could become a volume: what was found, and why it is none."""

    def __init__(self, message: str, summary: Summary) -> None:
        super().__init__(message)
        self.summary = summary


@dataclass
class Summary:
    """The outcome of one ingest: a verdict for each file found, and the volumes of this run."""

    files: Verdicts = field(default_factory=Verdicts)
    committed: list[Volume] = field(default_factory=list)
    """Made by this run."""
    fresh: list[Volume] = field(default_factory=list)
    """Already in the store, from the same source and recipe."""
    sources: tuple[SourcePlace, ...] = ()
    """What the run was given."""
    whole: bool = False
    """The sources are all that the store is made from: what none of them leads to is no part of it."""
    dry_run: bool = False
    planned: list[str] = field(default_factory=list)
    """Sources that would become volumes (dry run only)."""
    planned_bytes: int = 0
    """What of them lies in object storage and would be fetched (dry run only)."""
    refused_volumes: int = 0
    damaged_files: int = 0
    """Refused before it was known which volume they belong to: one may lack a slice at its end."""
    absent: int = 0
    """Volumes of the store that none of this run's sources leads to; they are kept."""
    outdated: list[str] = field(default_factory=list)
    """Volumes of the store that an earlier recipe made: kept, but not read until they are made anew."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Volumes of the store with the very same pixels and geometry, under other identities."""
    phi_scan: PhiScan | None = None
    """What a search for the patients of the sources looked at and found; None where there was none."""

    def __repr__(self) -> str:
        files = ", ".join(f"{status}={count}" for status, count in self.counts.items())
        return f"Summary(committed={len(self.committed)}, fresh={len(self.fresh)}, files: {files})"

    @property
    def found(self) -> bool:
        """Whether anything was found that could become a volume."""
        return bool(self.committed or self.fresh or self.planned or self.refused_volumes)

    @property
    def volumes(self) -> list[Volume]:
        """All volumes that the sources of this run lead to."""
        return sorted([*self.committed, *self.fresh], key=lambda volume: volume.volume_id)

    @property
    def counts(self) -> dict[str, int]:
        """How many files met each verdict; sums to the files found."""
        return self.files.counts()

    def document(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return self.document_without_files() | {"files": [verdict.document() for verdict in self.files]}

    def document_without_files(self) -> dict[str, Any]:
        """Return the same without the verdicts on files, which may be millions."""
        tally = self.files.tally().items()
        return {
            "sources": [printable(source) for source in self.sources],
            "files_found": len(self.files),
            "counts": self.counts,
            "codes": dict(sorted((f"{status}:{code}", count) for (status, code), (count, _) in tally)),
            "committed": [volume.volume_id for volume in self.committed],
            "fresh": [volume.volume_id for volume in self.fresh],
            "planned": [printable(name) for name in self.planned],
            "planned_bytes": self.planned_bytes,
            "refused_volumes": self.refused_volumes,
            "damaged_files": self.damaged_files,
            "absent_volumes": self.absent,
            "outdated_volumes": self.outdated,
            "duplicates": self.duplicates,
            "volumes": [_volume_document(volume) for volume in self.volumes],
            "phi_scan": self.phi_scan.document() if self.phi_scan else None,
        }

    def table(self) -> Table:
        """Return the summary table: one row a verdict and code, the last row their sum."""
        table = Table(title="Files found", title_justify="left", show_footer=True)
        table.add_column("verdict", footer="sum")
        table.add_column("code")
        table.add_column("files", justify="right", footer=str(len(self.files)))
        table.add_column("first of them, why", overflow="fold")
        for status, code, count, example in self.files.ordered_tally():
            why = "" if status == "used" else f"{example.path.name}: {example.detail}".rstrip(": ")
            table.add_row(status, code, str(count), printable(why))
        return table

    def conclusion(self, out: object) -> str:
        """Return the last line: what is in the store now and what this run did."""
        where = printable(out)
        if self.dry_run:
            planned = counted(len(self.planned), "volume")
            planned += f" ({size_text(self.planned_bytes)} to fetch)" if self.planned_bytes else ""
            return f"dry run: {planned} would be made in {where}, {self.refused_volumes} refused; nothing was written"
        fresh = f"{len(self.fresh)} {'was' if len(self.fresh) == 1 else 'were'} up to date"
        if self.committed:
            text = f"{counted(len(self.committed), 'volume')} committed to {where}, {fresh}"
        elif self.fresh:
            verb = "is" if len(self.fresh) == 1 else "are"
            text = f"nothing to do: {counted(len(self.fresh), 'volume')} {verb} up to date in {where}"
        else:
            text = f"no volume was made{f' in {where}' if self.found else ''}"
        text += f"; {self.refused_volumes} refused" if self.refused_volumes else ""
        return "; ".join([text, *self._remarks()])

    def _remarks(self) -> list[str]:
        """Return what else there is to say of the store, one clause each."""
        damaged, outdated, alike = self.damaged_files, len(self.outdated), len(self.duplicates)
        clauses = (
            (damaged, f"{counted(damaged, 'damaged file')}, of whatever volumes they belong to"),
            (self.absent, f"{counted(self.absent, 'volume')} of the store came from other sources than these (kept)"),
            (outdated, f"{counted(outdated, 'volume')} of an earlier recipe: not read until ingested again"),
            (alike, f"{counted(alike, 'group')} of volumes with the same pixels under several identities"),
        )
        return [clause for count, clause in clauses if count]

    def noted(self) -> list[str]:
        """Return a line on the notes that this run's volumes carry; none where they carry none."""
        notes = Counter(note for volume in self.committed for note in volume.notes)
        if not notes:
            return []
        found = ", ".join(f"{note} ({counted(count, 'volume')})" for note, count in sorted(notes.items()))
        return [f"noted: {found}; `maesil store explain STORE VOLUME` says what a note means"]

    def refusals(self) -> list[str]:
        """Return one line for each of the first few refused sources, and how many more there are."""
        lines: dict[str, str] = {}
        for verdict in self.files.of_status("quarantined"):
            lines.setdefault(f"{verdict.path.parent}{verdict.code}{verdict.detail}", _refusal_line(verdict))
        shown = list(lines.values())[:_EXPLANATIONS_SHOWN]
        return shown + (
            [f"... and {len(lines) - len(shown)} more (--json lists all)"] if len(lines) > len(shown) else []
        )


def _refusal_line(verdict: FileVerdict) -> str:
    return printable(f"refused {verdict.path}: {verdict.code}: {verdict.detail}")


def _volume_document(volume: Volume) -> dict[str, Any]:
    return {
        "volume_id": volume.volume_id,
        "shape_zyx": list(volume.shape),
        "spacing_zyx_mm": [round(mm, 6) for mm in volume.spacing],
        "source_spacing_zyx_mm": [round(mm, 6) for mm in volume.source_spacing],
        "superpatches": len(volume.superpatches),
        "body_share": volume.hu["body_share"],
        "notes": list(volume.notes),
    }
