"""What an ingest did, for people (a table whose rows sum to the files found) and for programs (JSON)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from maesil.ingest.verdict import STATUSES, FileVerdict
from maesil.store.records import Volume

_EXPLANATIONS_SHOWN = 8


@dataclass
class Summary:
    """The outcome of one ingest: a verdict for each file found, and the volumes of this run."""

    files: list[FileVerdict] = field(default_factory=list)
    committed: list[Volume] = field(default_factory=list)
    """Made by this run."""
    fresh: list[Volume] = field(default_factory=list)
    """Already in the store, from the same source and recipe."""
    dry_run: bool = False
    planned: list[str] = field(default_factory=list)
    """Sources that would become volumes (dry run only)."""
    refused_volumes: int = 0
    damaged_files: int = 0
    """Refused before it was known which volume they belong to: one may lack a slice at its end."""
    absent: int = 0
    """Volumes of the store that none of this run's sources leads to; they are kept."""
    outdated: list[str] = field(default_factory=list)
    """Volumes of the store that an earlier recipe made: kept, but not read until they are made anew."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Volumes of the store with the very same pixels and geometry, under other identities."""

    @property
    def volumes(self) -> list[Volume]:
        """All volumes that the sources of this run lead to."""
        return sorted([*self.committed, *self.fresh], key=lambda volume: volume.volume_id)

    @property
    def counts(self) -> dict[str, int]:
        """How many files met each verdict; sums to the files found."""
        found = Counter(verdict.status for verdict in self.files)
        return {status: found[status] for status in STATUSES}

    def document(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "files_found": len(self.files),
            "counts": self.counts,
            "codes": dict(sorted(Counter(f"{v.status}:{v.code}" for v in self.files).items())),
            "committed": [volume.volume_id for volume in self.committed],
            "fresh": [volume.volume_id for volume in self.fresh],
            "planned": self.planned,
            "refused_volumes": self.refused_volumes,
            "damaged_files": self.damaged_files,
            "absent_volumes": self.absent,
            "outdated_volumes": self.outdated,
            "duplicates": self.duplicates,
            "volumes": [_volume_document(volume) for volume in self.volumes],
            "files": [
                {"path": str(v.path), "status": v.status, "code": v.code, "volume_id": v.volume_id, "detail": v.detail}
                for v in self.files
            ],
        }

    def table(self) -> Table:
        """Return the summary table: one row a verdict and code, the last row their sum."""
        table = Table(title="Files found", title_justify="left", show_footer=True)
        table.add_column("verdict", footer="sum")
        table.add_column("code")
        table.add_column("files", justify="right", footer=str(len(self.files)))
        table.add_column("first of them, why", overflow="fold")
        first: dict[tuple[str, str], FileVerdict] = {}
        for verdict in self.files:
            first.setdefault((verdict.status, verdict.code), verdict)
        counted = Counter((v.status, v.code) for v in self.files)
        for status, code in sorted(counted, key=lambda pair: (STATUSES.index(pair[0]), pair[1])):
            example = first[status, code]
            why = "" if status == "used" else f"{example.path.name}: {example.detail}".rstrip(": ")
            table.add_row(status, code, str(counted[status, code]), why)
        return table

    def conclusion(self, out: object) -> str:
        """Return the last line: what is in the store now and what this run did."""
        if self.dry_run:
            refused = f"{self.refused_volumes} refused"
            return f"dry run: {len(self.planned)} volumes would be made in {out}, {refused}; nothing was written"
        if not self.committed:
            text = f"nothing to do: {len(self.fresh)} volumes are up to date in {out}"
        else:
            text = f"{len(self.committed)} volumes committed to {out}, {len(self.fresh)} were up to date"
        text += f"; {self.refused_volumes} refused" if self.refused_volumes else ""
        for count, what in (
            (self.damaged_files, "damaged files, of whatever volumes they belong to"),
            (self.absent, "volumes of the store have no source among these (kept)"),
            (len(self.outdated), "volumes are of an earlier recipe and are not read until ingested again"),
            (len(self.duplicates), "groups of volumes hold the same pixels under several identities"),
        ):
            text += f"; {count} {what}" if count else ""
        return text

    def refusals(self) -> list[str]:
        """Return one line for each of the first few refused sources, and how many more there are."""
        lines: dict[str, str] = {}
        for verdict in self.files:
            if verdict.status == "quarantined":
                lines.setdefault(f"{verdict.path.parent}{verdict.code}{verdict.detail}", _refusal_line(verdict))
        shown = list(lines.values())[:_EXPLANATIONS_SHOWN]
        return shown + (
            [f"... and {len(lines) - len(shown)} more (--json lists all)"] if len(lines) > len(shown) else []
        )


def _refusal_line(verdict: FileVerdict) -> str:
    return f"refused {verdict.path}: {verdict.code}: {verdict.detail}"


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
