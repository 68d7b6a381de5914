"""The commit of a volume: the only record that says a volume is in the store, what it is and where its bytes lie.

Format: ``docs/reference/store-format.md``. A commit checksums itself, so a damaged record is never believed.
"""

from __future__ import annotations

from typing import Any

import google_crc32c

from maesil.documents import canonical_json, parsed_json

CHECKSUM = "checksum_crc32c"
"""Field by which a record checks itself."""


def sealed(document: dict[str, Any]) -> bytes:
    """Return a record as canonical JSON with its own crc32c in it."""
    return canonical_json({**document, CHECKSUM: google_crc32c.value(canonical_json(document))})


def unsealed(data: bytes) -> dict[str, Any]:
    """Return the record that `sealed` wrote; ValueError unless every byte is as it was written."""
    document = parsed_json(data)
    if not isinstance(document, dict):
        raise ValueError("expected a JSON object")
    document.pop(CHECKSUM, None)
    # Byte for byte: 1e-5 and 1E-5 are the same number, but only one of them was written.
    if sealed(document) != data:
        raise ValueError("it does not match its own checksum; it was altered")
    return document


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
