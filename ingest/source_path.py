"""What names a source: a path on this machine, or an object whose URL answers the same questions."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from maesil.store.urls import SCHEMES, ObjectUrl, StorePlace

SourcePlace = StorePlace
"""Where sources lie: a folder or file of this machine, or a prefix in object storage."""
_URL = re.compile(rf"({'|'.join(SCHEMES)})://([^/]+)(?:/(.*))?", re.DOTALL)


@dataclass(frozen=True, order=True)
class ObjectFile(ObjectUrl):
    """One object, or a member of an archive that is one; what the listing said of it goes with it."""

    size: int = field(default=-1, compare=False)
    """Bytes; of a member those of its archive."""
    stamp: str = field(default="", compare=False)
    """ETag, or the time of the last change where there is none: another one once the object was replaced."""
    archive: ObjectFile | None = field(default=None, compare=False)
    """What a member lies in."""

    @property
    def suffix(self) -> str:
        """The last suffix of its name."""
        return PurePosixPath(self.name).suffix

    def with_suffix(self, suffix: str) -> ObjectFile:
        """Return what would lie beside it under another suffix; whether it is there is not known."""
        name = str(PurePosixPath(self.name).with_suffix(suffix))
        folder = self.folder.rpartition("/")[0]
        return ObjectFile(self.scheme, self.bucket, f"{folder}/{name}" if folder else name, archive=self.archive)

    def member(self, name: str) -> ObjectFile:
        """Return a member of this archive."""
        return ObjectFile(self.scheme, self.bucket, f"{self.folder}/{name}", self.size, self.stamp, self)


SourcePath = Path | ObjectFile
"""One file of a source."""


def source_path(text: str) -> SourcePath:
    """Return the file that a table names; nothing is known of an object yet but its name."""
    found = _URL.fullmatch(text)
    return Path(text) if found is None else ObjectFile(found[1], found[2], found[3] or "")


def by_place(place: SourcePlace) -> tuple[bool, SourcePlace]:
    """Return what places are sorted by, those of this machine and those of object storage among each other."""
    return isinstance(place, ObjectUrl), place


def common_folder(places: Sequence[SourcePlace]) -> str:
    """Return the folder that holds all places, as text."""
    schemes, paths = zip(*(str(place).rpartition("://")[::2] for place in places), strict=True)
    if len(set(schemes)) > 1:
        return "several places"
    common = os.path.commonpath(paths)
    return f"{schemes[0]}://{common}" if schemes[0] else common
