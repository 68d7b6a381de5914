"""Identities: keyed hashes in place of UIDs, patients and paths.

The key is the user's. It is created on first use, held by the driving process alone and never written to a store;
without it nobody can test whether a given patient or UID is in one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import platformdirs

from maesil.errors import UsageError
from maesil.ingest.plan import VolumePlan

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


def without_paths(text: str, paths: Iterable[Path]) -> str:
    """Return a message with every path, folder and name of the given files replaced: names of files name patients."""
    words = {str(word) for path in paths for word in (path, path.absolute(), path.parent, path.name)}
    for word in sorted(words - {".", ""}, key=len, reverse=True):
        text = text.replace(word, "<source>")
    return text


def write_id_map(path: Path, store: Path, volumes: Iterable[tuple[str, VolumePlan]]) -> None:
    """Write which identity became which volume, as JSON readable by the owner alone.

    `UsageError` if that would be within the store, which must hold no identity.
    """
    if path.resolve().is_relative_to(store.resolve()):
        raise UsageError(f"{path}: expected a file outside the store, which must hold no identity")
    entries = [
        {
            "volume_id": volume_id,
            "patient": plan.patient,
            "study": plan.study,
            "series": plan.series,
            "source": plan.source.name,
        }
        for volume_id, plan in volumes
    ]
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(entries, file, indent=1)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(_KEY_BYTES).encode())
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # whoever comes first makes the key
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)
