"""The commit of a volume: the only record that says a volume is in the store, what it is and where its bytes lie.

Format: ``docs/reference/store-format.md``. A commit checksums itself, so a damaged record is never believed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_COMMIT_KEY = re.compile(r"commits/[^/]+/(?P<volume_id>[^/]+)/(?P<generation>\d{8})\.json")


def volume_prefix(volume_id: str) -> str:
    """Return the key of the folder of all attempts at a volume."""
    return f"volumes/{volume_id[:2]}/{volume_id}"


def attempt_prefix(volume_id: str, attempt: str) -> str:
    """Return the key of the folder of one attempt: an OME-Zarr image."""
    return f"{volume_prefix(volume_id)}/{attempt}"


def commit_key(volume_id: str, generation: int) -> str:
    """Return the key of a commit record."""
    return f"commits/{volume_id[:2]}/{volume_id}/{generation:08d}.json"


def quarantine_key(volume_id: str) -> str:
    """Return the key of the record that says why a source was refused."""
    return f"quarantine/{volume_id[:2]}/{volume_id}.json"


def live_keys(keys: Iterable[str]) -> list[str]:
    """Return, of sorted keys, the commits of the highest generation of each volume, by volume id."""
    newest: dict[str, str] = {}
    for key in keys:
        if found := _COMMIT_KEY.fullmatch(key):  # other files may lie about: .DS_Store, .nfs...
            newest[found["volume_id"]] = key
    return [key for _, key in sorted(newest.items())]


def id_and_generation(key: str) -> tuple[str, int]:
    """Return volume and generation of the key of a commit."""
    found = _COMMIT_KEY.fullmatch(key)
    if found is None:
        raise ValueError(f"expected the key of a commit, found {key}")
    return found["volume_id"], int(found["generation"])
