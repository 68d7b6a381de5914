"""The recipe of a store: every parameter that can change a voxel, and the versions of the libraries that can."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from maesil.codes import RefusalCode
from maesil.documents import canonical_json
from maesil.errors import UsageError
from maesil.types import AIR_HU, MAP_CELL, Spacing

CODECS = ("fast", "compact", "raw")
FORMS = ("sform", "qform")
"""What a NIfTI header may say of where its voxels lie."""
ACCEPTABLE: tuple[RefusalCode, ...] = (
    "constant", "eight_bit", "implausible_size", "material_map", "mr_or_pet", "no_soft_tissue", "normalised",
    "odd_background", "offset_1024", "rescaled_twice", "slice_offset", "stand_ins", "too_dense", "unsigned", "windowed",
    "woven_passes", "wrapped", "wrong_scale",
)  # fmt: skip
"""Doubts about HU that a user may accept."""
REFUSABLE: tuple[RefusalCode, ...] = (
    "lossy", "no_rescale_tags", "undeclared_padding", "filled_border", "sagittal_slices", "coronal_slices",
    "burned_in_annotation", "animal", "quadruped", "patient_id_varies", "study_uid_varies", "series_reunited",
    "positions_rounded", "whole_words", "cone_beam",
)  # fmt: skip
"""Notes for which a user may refuse a volume."""
_LARGEST_SUPERPATCH = 512
_LIBRARIES = ("SimpleITK", "pydicom", "nibabel", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls")
_MAX_FILLED = 10


def _library_versions() -> tuple[tuple[str, str], ...]:
    return _versions_of(_LIBRARIES)


@cache
def _versions_of(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for name in names:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "absent"))
    return tuple(sorted(found))


@dataclass(frozen=True)
class Recipe:
    """How sources become superpatches; its hash is the identity of the result's making."""

    spacing: Spacing | None = (1.5, 1.5, 1.5)
    """Target spacing z, y, x (mm), or None: the source's own (ours; the paper states none)."""
    superpatch: int = 128
    """Edge of a superpatch (voxels)."""
    hu_range: tuple[int, int] = (AIR_HU, 3071)
    """Stored values are clipped to this range (HU): that of a 12-bit CT."""
    codec: str = "fast"
    """``fast`` (blosc-lz4, shuffle), ``compact`` (blosc-zstd 1, bitshuffle, 2 MiB blocks) or ``raw``."""
    fill_gaps: int = 0
    """How many missing slices in a row are interpolated, and marked not valid, instead of refusing the series."""
    include_derived: bool = False
    """Whether reformats (MPR, MIP...) become volumes."""
    prefer_form: str = ""
    """``sform`` or ``qform``: which one counts in a NIfTI file where they differ; empty refuses it."""
    accept: tuple[str, ...] = ()
    """Codes of doubts about HU that are accepted on purpose."""
    refuse: tuple[str, ...] = ()
    """Codes of notes that refuse a volume (``lossy``)."""
    method: str = "linear-gaussian-2/body-2/plausible-6/geometry-4"
    """Version of reading, resampling, body map and plausibility rules; changes when their results do."""
    libraries: tuple[tuple[str, str], ...] = field(default_factory=_library_versions)

    def __post_init__(self) -> None:
        if self.superpatch < MAP_CELL or self.superpatch % MAP_CELL:
            raise UsageError(
                f"--superpatch: expected a positive multiple of {MAP_CELL} voxels, found {self.superpatch}"
            )
        if self.superpatch > _LARGEST_SUPERPATCH:
            raise UsageError(f"--superpatch: expected at most {_LARGEST_SUPERPATCH} voxels, found {self.superpatch}")
        if self.spacing is not None and not all(0.1 <= mm <= 20 for mm in self.spacing):
            raise UsageError(f"--spacing: expected 'native' or 0.1 to 20 mm an axis, found {self.spacing}")
        if not 0 <= self.fill_gaps <= _MAX_FILLED:
            raise UsageError(f"--fill-gaps: expected 0 to {_MAX_FILLED} slices, found {self.fill_gaps}")
        if self.prefer_form not in ("", *FORMS):
            raise UsageError(f"--prefer: expected sform or qform, found {self.prefer_form!r}")
        for option, given, known in (("--accept", self.accept, ACCEPTABLE), ("--refuse", self.refuse, REFUSABLE)):
            if unknown := [code for code in given if code not in known]:
                raise UsageError(f"{option}: expected one of {', '.join(known)}, found {unknown[0]!r}")
        if self.codec not in CODECS:
            raise UsageError(f"--codec: expected one of {', '.join(CODECS)}, found {self.codec!r}")

    def document(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready values."""
        return {
            # Plain numbers, so that 2 and 2.0 are the same recipe.
            "spacing_zyx_mm": [float(mm) for mm in self.spacing] if self.spacing else "native",
            "superpatch_voxels": int(self.superpatch),
            "hu_range": [int(hu) for hu in self.hu_range],
            "codec": self.codec,
            "method": self.method,
            "libraries": dict(self.libraries),
            # Only what was asked for: stores made before there was such an option keep their hash.
            **{name: value for name, value in self._choices().items() if value},
        }

    def _choices(self) -> dict[str, Any]:
        return {
            "fill_gaps": self.fill_gaps,
            "include_derived": self.include_derived,
            "prefer_form": self.prefer_form,
            "accept": sorted(set(self.accept)),
            "refuse": sorted(set(self.refuse)),
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Recipe:
        """Return the recipe that `document` describes."""
        spacing = document["spacing_zyx_mm"]
        low, high = document["hu_range"]
        return cls(
            spacing=None if spacing == "native" else (float(spacing[0]), float(spacing[1]), float(spacing[2])),
            superpatch=int(document["superpatch_voxels"]),
            hu_range=(int(low), int(high)),
            codec=str(document["codec"]),
            fill_gaps=int(document.get("fill_gaps", 0)),
            include_derived=bool(document.get("include_derived", False)),
            prefer_form=str(document.get("prefer_form", "")),
            accept=tuple(map(str, document.get("accept", ()))),
            refuse=tuple(map(str, document.get("refuse", ()))),
            method=str(document["method"]),
            libraries=tuple((str(k), str(v)) for k, v in document["libraries"].items()),
        )

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the recipe."""
        return hashlib.sha256(canonical_json(self.document())).hexdigest()

    def difference(self, other: Recipe) -> str:
        """Return in words what sets another recipe apart, for messages."""
        mine, theirs = _flat(self.document()), _flat(other.document())
        names = [*mine, *(name for name in theirs if name not in mine)]
        return "; ".join(
            f"{name}: {mine.get(name)} -> {theirs.get(name)}" for name in names if mine.get(name) != theirs.get(name)
        )


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's document with each library a value of its own."""
    flat = {name: value for name, value in document.items() if name != "libraries"}
    flat.update(document["libraries"])
    return flat


def parse_spacing(text: str) -> Spacing | None:
    """Return the spacing that ``native``, ``MM`` or ``Z,Y,X`` (mm) names; None is native."""
    if text.strip().lower() == "native":
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3):
        raise UsageError(f"--spacing: expected 'native', MM or Z,Y,X (for example 1.5 or 3,0.8,0.8), found {text!r}")
    z, y, x = values * 3 if len(values) == 1 else values
    return z, y, x
