"""Identities: keyed hashes in place of UIDs, patients and paths.

The key is the user's. It is created on first use, held by the driving process alone and never written to a store;
without it nobody can test whether a given patient or UID is in one.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

import platformdirs

from maesil.errors import UsageError
from maesil.files import require_writable, whole_file, write_whole
from maesil.ingest.plan import VolumePlan
from maesil.ingest.source_path import SourcePath
from maesil.store.urls import StorePlace, lies_in
from maesil.text import printable

_KEY_BYTES = 32
_HEX_DIGITS = 32


class IdentityKey:
    """A secret key and the hashes made with it."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def hash(self, purpose: str, identity: str) -> str:
        """Return HMAC-SHA256 (first 32 hex digits) of an identity, for one purpose (volume, group, path...)."""
        message = f"{purpose}\0{identity}".encode("utf-8", "surrogateescape")
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()[:_HEX_DIGITS]

    @property
    def fingerprint(self) -> str:
        """What a store remembers of the key it was made with: tells keys apart, gives none away."""
        return self.hash("fingerprint", "")[:16]


def without_paths(text: str, paths: Iterable[SourcePath]) -> str:
    """Return a message with ``<source>`` for every path, folder and name of the given files: they name patients.

    A name is taken where it stands by itself, never out of a longer word or number. One that may as well be a number or
    a short word of the message (``28``, ``CT``) is taken only in quotes, in front of a colon, or as part
    of a path.
    """
    found = {written: _pattern(word) for path in paths for word in _words_of(path) for written in _spellings(word)}
    for written in sorted(found, key=len, reverse=True):
        if written in text:
            text = re.sub(found[written].replace("{}", re.escape(written)), "<source>", text)
    return text


_ANYWHERE = r"(?<!\w){}(?!\w)"
_BY_ITSELF = r"(?<![\w.-]){}(?![\w-]|\.\w)"
_MARKED = r"(?<=['\"/]){}(?=['\"/]|$)|^{}(?=:)"
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_SHORTEST_NAME = 4


def _words_of(path: SourcePath) -> set[str]:
    return {str(path), str(path.absolute()), str(path.parent), path.name} - {".", "/", ""}


def _spellings(word: str) -> set[str]:
    """Return how an error may write a name: as it is, as Python quotes it, as we print it."""
    return {word, repr(word)[1:-1], printable(word)}


def _pattern(word: str) -> str:
    if "/" in word:
        return _ANYWHERE if word[0] != "/" else r"{}(?!\w)"
    return _MARKED if _NUMBER.fullmatch(word) or len(word) < _SHORTEST_NAME else _BY_ITSELF


def require_map_place(path: Path, store: StorePlace) -> None:
    """Raise UsageError unless an id map can be written here: outside the store, which must hold no identity."""
    if lies_in(path, store):
        raise UsageError(f"--id-map: {path}: expected a file outside the store, which must hold no identity")
    if path.is_dir():
        raise UsageError(f"--id-map: {path}: expected the name of a file to write, found a folder; name another")
    require_writable(path.parent, "--id-map")


def write_id_map(path: Path, volumes: Iterable[tuple[str, VolumePlan]]) -> None:
    """Write which identity became which volume, as JSON readable by the owner alone."""
    entries = [
        {
            "volume_id": volume_id,
            "patient": plan.patient,
            "study": plan.study,
            "series": plan.series,
            "source": printable(plan.source.name),
        }
        for volume_id, plan in volumes
    ]
    write_whole(path, json.dumps(entries, indent=1), private=True)


def default_key_file() -> Path:
    """Return where the user's key lies: in the configuration folder of the platform."""
    return Path(platformdirs.user_config_dir("maesil")) / "identity.key"


def load_or_create_key(path: Path | None = None) -> IdentityKey:
    """Return the key of a file, which is created (mode 0600) on first use; the user's own if none is named.

    `UsageError` if the path cannot be a key file, or its content no key.
    """
    named = path is not None
    path = path or default_key_file()
    if not path.exists():
        if named and not path.parent.is_dir():
            raise UsageError(f"{path}: expected a key file or a folder to create it in, found neither")
        _create(path)
    if not path.is_file():
        raise UsageError(f"{path}: expected a key file, found a folder")
    secret = path.read_bytes().strip()
    if len(secret) < _KEY_BYTES:
        raise UsageError(f"{path}: expected an identity key of at least {_KEY_BYTES} bytes, found {len(secret)}")
    return IdentityKey(secret)


def _create(path: Path) -> None:
    require_writable(path.parent, "--key-file", links=True)
    # Whoever comes first makes the key.
    with contextlib.suppress(FileExistsError), whole_file(path, new=True, durable=True, private=True) as partial:
        partial.write_bytes(secrets.token_hex(_KEY_BYTES).encode())
