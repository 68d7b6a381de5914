"""What became of each file: exactly one verdict a file, so that the totals add up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from maesil.ingest.source_path import SourcePath
from maesil.text import printable, written

Status = Literal["used", "skipped", "quarantined", "ignored"]
STATUSES: tuple[Status, ...] = get_args(Status)
OTHER_PARTITION = "other_partition"
"""The code of what is left to another part of the work."""


@dataclass(frozen=True, slots=True)
class FileVerdict:
    """``used``, ``skipped`` (understood, not wanted), ``quarantined`` (not trusted) or ``ignored`` (no CT), and why."""

    path: SourcePath
    status: Status
    code: str
    volume_id: str | None = None
    detail: str = ""
    more_volumes: tuple[str, ...] = ()
    """Other volumes that hold frames of the same file."""

    @property
    def volume_ids(self) -> tuple[str, ...]:
        """All volumes, or the refused source, that the file belongs to."""
        return (*filter(None, (self.volume_id,)), *self.more_volumes)

    def document(self) -> dict[str, Any]:
        """Return the verdict as JSON-ready values; the path as `maesil.text.exact` reads it."""
        return {
            "path": written(self.path),
            "status": self.status,
            "code": self.code,
            "volume_id": self.volume_id,
            "detail": printable(self.detail),
            "more_volumes": list(self.more_volumes),
        }


def one_per_file(verdicts: Iterable[FileVerdict]) -> list[FileVerdict]:
    """Return one verdict a file: of a multi-frame object whose frames met several, the first of the best status."""
    by_file: dict[SourcePath, list[FileVerdict]] = {}
    for verdict in verdicts:
        by_file.setdefault(verdict.path, []).append(verdict)
    return [_best(met) if len(met) > 1 else met[0] for met in by_file.values()]


def _best(met: list[FileVerdict]) -> FileVerdict:
    best = min(met, key=lambda verdict: _RANK[verdict.status])
    same = [v.volume_id for v in met if v.status == best.status and v.volume_id and v is not best]
    return replace(best, more_volumes=tuple(same))


_RANK = {status: rank for rank, status in enumerate(("used", "quarantined", "skipped", "ignored"))}
