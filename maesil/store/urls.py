"""Where a store lies: a folder of this machine, or a place in object storage that a URL names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from maesil.errors import UsageError
from maesil.text import without_credentials

SCHEMES = ("s3", "gs", "az")
"""What a URL of object storage begins with: Amazon S3 and whatever speaks its language, Google, Azure."""
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True, order=True)
class ObjectUrl:
    """A folder in object storage, ``s3://BUCKET/FOLDER``; it answers the questions of a `Path` that both can answer."""

    scheme: str
    bucket: str
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.folder}" if self.folder else "")

    @property
    def name(self) -> str:
        """The last part of it."""
        return self.folder.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> ObjectUrl:
        """The folder that it lies in; of a bucket, the bucket."""
        return ObjectUrl(self.scheme, self.bucket, self.folder.rpartition("/")[0])

    def resolve(self) -> ObjectUrl:
        """Return itself: there are no links."""
        return self

    def absolute(self) -> ObjectUrl:
        """Return itself: there is no current folder."""
        return self


StorePlace = Path | ObjectUrl
"""Where a store lies."""


def place_of(text: str | StorePlace) -> StorePlace:
    """Return the folder that a path or a ``file://`` URL names, or the place in object storage that a URL names.

    UsageError, in one line that repeats no credential, for any other URL.
    """
    if not isinstance(text, str):
        return text
    url = _URL.fullmatch(text)
    if url is None or url["scheme"].lower() == "file":
        return local_path(text)
    scheme, (bucket, _, folder) = url["scheme"].lower(), url["rest"].partition("/")
    if "@" in bucket:
        raise UsageError(
            f"{scheme}://...@{bucket.rpartition('@')[2]}: expected no credentials in a URL; give them by the "
            "environment (docs/how-to/object-storage.md)"
        )
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://BUCKET/FOLDER" for one in SCHEMES)
        raise UsageError(f"{without_credentials(text)}: expected a path, file:///PATH, or one of {known}")
    if re.search(r"[?#]", url["rest"]) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise UsageError(f"{without_credentials(text)}: expected {scheme}://BUCKET/FOLDER and nothing behind it")
    parts = [part for part in folder.split("/") if part]
    if {".", ".."} & {*parts}:
        raise UsageError(f"{text}: expected a folder without . and .. in its name")
    return ObjectUrl(scheme, bucket, "/".join(parts))


def local_path(text: str | Path) -> Path:
    """Return the path that a path or a ``file://`` URL names; UsageError for URLs of other schemes, in one line."""
    url = _URL.fullmatch(str(text))
    if url is None:
        return Path(text)
    host, slash, path = url["rest"].partition("/")
    if url["scheme"].lower() != "file" or host not in ("", "localhost") or not slash:
        raise UsageError(
            f"{without_credentials(str(text))}: expected a path or file:///PATH; no other URL can be used here"
        )
    return Path(unquote("/" + path))


def lies_in(path: Path, place: StorePlace) -> bool:
    """Return whether a file or folder of this machine lies in a store, or is it."""
    return isinstance(place, Path) and path.resolve().is_relative_to(place.resolve())
