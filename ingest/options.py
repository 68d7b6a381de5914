"""How to run an ingest; nothing here changes a voxel (see `maesil.store.recipe.Recipe` for what does)."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from maesil.errors import SecurityError, UsageError

DUPLICATES = ("keep-all", "keep-first")


@dataclass(frozen=True)
class IngestOptions:
    """How to run."""

    workers: int | None = None
    """Dask worker processes; None is one per core, as far as memory allows, 0 runs in this process."""
    scheduler: str | None = None
    """Address of a running Dask scheduler, in place of a cluster of one's own."""
    trust_network: bool = False
    """Allow a scheduler that is neither on this machine nor reached by TLS."""
    partition: tuple[int, int] | None = None
    """(i, n): do only the volumes of the i-th of n parts; 0 and n are the same part."""
    dry_run: bool = False
    update: bool = False
    """Allow a recipe other than the store's: its volumes are made anew."""
    rehash: bool = False
    """Read every source again instead of trusting size and modification time."""
    force: bool = False
    """Make every volume anew, even from the same source and recipe."""
    retry_quarantined: tuple[str, ...] = ()
    """Codes of earlier refusals to try again; ``all`` for every one."""
    duplicates: str = "keep-all"
    """``keep-first``: of sources with the very same pixels and geometry only one becomes a volume."""
    follow_links: bool = False
    """Follow symbolic links below a source."""
    group: str = ""
    """Regular expression that finds the patient in the path of a source whose files name none."""
    mirror: bool = False
    """Take out of the store what none of the sources leads to any more."""
    key_file: Path | None = None
    id_map: Path | None = None
    """Where to write which identity became which id (mode 0600); None does not."""
    cache_folder: Path | None = None
    """Where source hashes are remembered; None is the user's cache folder."""

    def __post_init__(self) -> None:
        if self.duplicates not in DUPLICATES:
            raise UsageError(f"--duplicates: expected one of {', '.join(DUPLICATES)}, found {self.duplicates!r}")
        try:
            re.compile(self.group)
        except re.error as error:
            raise UsageError(f"--group: expected a regular expression, found {self.group!r} ({error})") from None
        if self.partition is not None and not 0 <= self.partition[0] <= self.partition[1] > 0:
            raise UsageError(
                f"--partition: expected I/N with I from 0 to N, found {'/'.join(map(str, self.partition))}"
            )
        if self.scheduler is not None and not self.trust_network:
            _require_safe(self.scheduler)


def parse_partition(text: str) -> tuple[int, int]:
    """Return (i, n) of ``i/n``."""
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        raise UsageError(f"--partition: expected I/N, for example 3/8, found {text!r}") from None
    return number, count


def _require_safe(address: str) -> None:
    """A scheduler and its workers run whatever they are sent: by TCP they must be on this machine."""
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    if parts.scheme == "tls" or parts.hostname == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise SecurityError(
            f"--scheduler: expected an address on this machine or tls://, found {address}: whoever reaches a plain TCP "
            "scheduler can run code on all its workers; name a tls:// address, or --trust-network"
        )
