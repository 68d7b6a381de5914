"""What a store records of a volume (what it is, where the bytes of its superpatches lie), and of a refused source.

Format: ``docs/reference/store-format.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import compress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from maesil.documents import reason, sealed, unsealed
from maesil.errors import StoreError
from maesil.geometry import Affine
from maesil.store.commit import attempt_prefix, commit_key
from maesil.types import Spacing, Zyx

Technical = dict[str, str | float]
"""How a source was made and stored, in allow-listed tags: technical values, and no word of a patient."""


@dataclass(frozen=True)
class Superpatch:
    """One superpatch of a volume: where its encoded bytes lie, and shares (0..1) of its voxels."""

    index: Zyx
    """Position on the grid of superpatches (z, y, x)."""
    path: str
    """Key of the shard file, relative to the store."""
    offset: int
    length: int
    """Bytes in the shard file, the 4 trailing bytes of the crc32c included."""
    crc32c: int
    valid: float
    """Share inside the scan: neither padding nor beyond the volume."""
    body: float
    """Share inside the patient's body."""
    air: float
    """Share of valid voxels at or below -900 HU."""


class Rows(Protocol):
    """What a volume of a table is read from (`maesil.store.segments.Segment`)."""

    def fields(self, row: int, name: str) -> dict[str, Any]:
        """Return a field of the volume of a row that it does not know yet, and others that come with it."""

    def count(self, row: int) -> int:
        """Return how many superpatches the volume of a row has."""

    def column(self, row: int, name: str) -> NDArray[Any]:
        """Return one value for each superpatch of a row."""

    def paths(self, row: int) -> list[str]:
        """Return the shard file of each superpatch of a row."""


@dataclass(frozen=True)
class Volume:
    """One committed volume: geometry in mm LPS, provenance without identities, and its superpatches."""

    volume_id: str
    """HMAC-SHA256 of the identity (32 hex digits); never a UID or a file name."""
    group: str
    """Patient group for splits: HMAC of the patient, or the volume's own id where no patient is known."""
    attempt: str
    source_hash: str
    """SHA-256 over what decides the voxels: geometry, rescale and pixel data of the source."""
    recipe_hash: str
    source_path: str
    """HMAC of the source's path, to report sources that vanished."""
    shape: Zyx
    """Voxels along z, y, x."""
    affine_lps: tuple[tuple[float, float, float, float], ...]
    """4x4, voxel index (z, y, x, 1) to mm LPS (x, y, z, 1); see `maesil.geometry`."""
    spacing: Spacing
    """Distance of stored voxels z, y, x (mm)."""
    source_shape: Zyx
    source_spacing: Spacing
    """Of the source, on the same (canonical) axes (mm)."""
    tile: int
    """Edge of a superpatch (voxels)."""
    codec: str
    source: Technical
    hu: dict[str, float]
    """Statistics of the stored valid voxels (HU), and how many were clipped."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """What ingest noticed and accepted, as codes."""
    superpatches: tuple[Superpatch, ...] = field(default_factory=tuple, repr=False)
    documents: dict[str, int] = field(default_factory=dict, repr=False)
    """crc32c of each Zarr metadata document of the attempt, by its key below it."""
    generation: int = 0

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return a field that the volume of a table does not know yet (`read_later`)."""
            rows = self.__dict__.get("_rows")
            if rows is None or name not in self.__dataclass_fields__:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
            self.__dict__.update(rows.fields(self.__dict__["_row"], name))
            return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        """Return all fields: a copy for another process is no part of a table."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def read_later(cls, known: Mapping[str, Any], rows: Rows, row: int) -> Volume:
        """Return the volume of a row of a table, some fields of which are known; all others are read when asked for."""
        volume = object.__new__(cls)
        object.__setattr__(volume, "__dict__", {**known, "_rows": rows, "_row": row})
        return volume

    @property
    def count(self) -> int:
        """How many superpatches."""
        known = self.__dict__
        return known["_rows"].count(known["_row"]) if "superpatches" not in known else len(self.superpatches)

    def column(self, name: str) -> NDArray[Any]:
        """Return a number of each superpatch, ``[n]``: a field of `Superpatch`, or ``iz``, ``iy``, ``ix``."""
        known = self.__dict__
        if "superpatches" not in known:
            found: NDArray[Any] = known["_rows"].column(known["_row"], name)
            return found
        if name in ("iz", "iy", "ix"):
            return np.array([patch.index["zyx".index(name[1])] for patch in self.superpatches], dtype=np.int32)
        kind = np.int64 if name in ("offset", "length", "crc32c") else np.float64
        return np.array([getattr(patch, name) for patch in self.superpatches], dtype=kind)

    @property
    def paths(self) -> list[str]:
        """The shard file of each superpatch."""
        known = self.__dict__
        if "superpatches" not in known:
            found: list[str] = known["_rows"].paths(known["_row"])
            return found
        return [patch.path for patch in self.superpatches]

    def taking(self, which: NDArray[np.bool_]) -> Volume:
        """Return this volume with some of its superpatches alone, ``[n]``: those of a table stay in their columns."""
        known = dict(self.__dict__)
        if "superpatches" in known:
            return replace(self, superpatches=tuple(compress(self.superpatches, which)))
        rows = known.pop("_rows")
        return Volume.read_later(known, _Some(rows, which), known.pop("_row"))

    def __repr__(self) -> str:
        z, y, x = self.shape
        mm = ", ".join(f"{step:g}" for step in self.spacing)
        return f"Volume({self.volume_id[:12]}, {z}x{y}x{x} voxels of ({mm}) mm, {self.count} superpatches)"

    @property
    def affine(self) -> Affine:
        """The affine as a float64 array."""
        return np.asarray(self.affine_lps, dtype=np.float64)

    @property
    def grid(self) -> Zyx:
        """Superpatches along z, y, x."""
        z, y, x = (-(-n // self.tile) for n in self.shape)
        return z, y, x

    @property
    def oriented(self) -> bool:
        """Whether S, P, L name the directions of the patient: they do not for an animal on four legs."""
        return "quadruped" not in self.notes

    @property
    def prefix(self) -> str:
        """Key of the folder that holds the live attempt."""
        return attempt_prefix(self.volume_id, self.attempt)

    @property
    def key(self) -> str:
        """Key of this commit."""
        return commit_key(self.volume_id, self.generation)

    @property
    def pixels(self) -> tuple[Any, ...]:
        """What volumes of the very same stored voxels share, however their sources were encoded or named."""
        spacing = tuple(round(mm, 3) for mm in self.spacing)
        patches = tuple((patch.length, patch.crc32c) for patch in self.superpatches)
        return self.recipe_hash, self.shape, spacing, tuple(sorted(self.hu.items())), patches

    def same_content(self, other: Volume) -> bool:
        """Return whether two commits hold the same voxels made the same way (attempt and generation aside)."""
        return (self.source_hash, self.recipe_hash) == (other.source_hash, other.recipe_hash)

    def to_json(self) -> bytes:
        """Return the record as canonical JSON with its own crc32c."""
        return sealed(self.document())

    def document(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: bytes, key: str) -> Volume:
        """Return the volume that a commit file describes; `StoreError` if the file is damaged."""
        try:
            document = unsealed(data)
        except ValueError as error:
            raise StoreError(f"{key}: expected a commit record, found damage ({reason(error)})") from error
        try:
            volume = cls._from_document(document)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{key}: expected a commit this version of maesil knows, found another ({reason(error)})"
            ) from error
        if volume.key != key:
            raise StoreError(f"{key}: expected the commit of this name, found {volume.key}; it was moved")
        return volume

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> Volume:
        document["superpatches"] = tuple(
            Superpatch(**{**entry, "index": tuple(entry["index"])}) for entry in document["superpatches"]
        )
        return cls(**cls.fields_of(document))

    @staticmethod
    def fields_of(document: dict[str, Any]) -> dict[str, Any]:
        """Return fields as a volume holds them, of those that a document of JSON has: tuples in place of lists."""
        document["affine_lps"] = tuple(tuple(row) for row in document["affine_lps"])
        for name in ("shape", "spacing", "source_shape", "source_spacing", "notes"):
            document[name] = tuple(document[name])
        return document

    def at_generation(self, generation: int) -> Volume:
        """Return the same record under another generation number."""
        return replace(self, generation=generation)


@dataclass(frozen=True)
class _Some:
    """Some superpatches of the volume of a row (`Rows`)."""

    rows: Rows
    which: NDArray[np.bool_]

    def fields(self, row: int, name: str) -> dict[str, Any]:
        found = self.rows.fields(row, name)
        if "superpatches" in found:
            found["superpatches"] = tuple(compress(found["superpatches"], self.which))
        return found

    def count(self, row: int) -> int:
        return int(np.count_nonzero(self.which))

    def column(self, row: int, name: str) -> NDArray[Any]:
        found: NDArray[Any] = self.rows.column(row, name)[self.which]
        return found

    def paths(self, row: int) -> list[str]:
        return list(compress(self.rows.paths(row), self.which))


@dataclass(frozen=True)
class Refusal:
    """One record of the quarantine: why a source became no volume, in codes and numbers, without path or identity.

    What is None is not written: a record of an earlier version may lack it.
    """

    volume_id: str
    """That of the volume which it would have become."""
    code: str
    """One of `maesil.codes`, or of another version of maesil."""
    detail: str
    numbers: Mapping[str, Any] | None = None
    """Measured values that the code rests on, as JSON knows them."""
    recipe_hash: str | None = None
    source_hash: str | None = None
    """Of what was refused; empty where it could not be read, None where the headers alone decided."""
    files: int | None = None
    """How many files the source has."""

    def document(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Refusal:
        """Return the refusal that `document` describes; KeyError for what is none."""
        required = {name: document[name] for name in ("volume_id", "code", "detail")}
        optional = ("numbers", "recipe_hash", "source_hash", "files")
        return cls(**required, **{name: document[name] for name in optional if name in document})
