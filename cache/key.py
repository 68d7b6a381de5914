"""What a store of the catalogue is known by: where its sources lie and how they become voxels.

Whether the sources are still what the store was made from is another question, which `listing` answers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import platformdirs

from maesil.documents import canonical_json
from maesil.store.storage import Stamp
from maesil.store.urls import StorePlace

CACHE_VARIABLE = "MAESIL_CACHE"
_HEX_DIGITS = 16


def cache_folder() -> Path:
    """Return where stores without a place of their own live: ``$MAESIL_CACHE``, else the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE, "").strip()
    return Path(named).expanduser().absolute() if named else Path(platformdirs.user_cache_dir("maesil"))


def store_key(sources: Iterable[StorePlace], recipe_hash: str, key_fingerprint: str, *choices: str) -> str:
    """Return 16 hex digits of SHA-256 over the sources' places, the recipe, the identity key and further choices.

    ``choices`` are what else decides which volumes there are (``--duplicates``, ``--follow-links``).
    """
    places = sorted({str(source.resolve()) for source in sources})
    document = [[os.fsencode(place).hex() for place in places], recipe_hash, key_fingerprint, *choices]
    return hashlib.sha256(canonical_json(document)).hexdigest()[:_HEX_DIGITS]


def listing(files: Iterable[tuple[str, Stamp | None]], choices: Sequence[str] = ()) -> str:
    """Return SHA-256 over names and stamps of files: equal while none was added, removed, edited.

    A stamp is None where a file cannot be looked at: a link that leads nowhere, or one gone meanwhile. ``choices`` are
    what else must be as before.
    """
    digest = hashlib.sha256(canonical_json(list(choices)))
    for name, stamp in files:
        digest.update(os.fsencode(name) + f"\0{stamp}\n".encode())
    return digest.hexdigest()
