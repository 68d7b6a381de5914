"""What became of each file: exactly one verdict a file, so that the totals add up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STATUSES = ("used", "skipped", "quarantined", "ignored")


@dataclass(frozen=True)
class FileVerdict:
    """``used``, ``skipped`` (understood, not wanted), ``quarantined`` (not trusted) or ``ignored`` (no CT), and why."""

    path: Path
    status: str
    code: str
    volume_id: str | None = None
    detail: str = ""
