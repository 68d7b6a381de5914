"""What there is to read for one volume."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from maesil.geometry import Affine
from maesil.ingest import limits
from maesil.ingest.scanned import SCANNED_BYTES
from maesil.ingest.source_path import SourcePath, SourcePlace
from maesil.store.records import Technical


@dataclass(frozen=True)
class Source:
    """What a worker needs to read one volume; holds no identity."""

    kind: Literal["slices", "nifti"]
    paths: tuple[SourcePath, ...]
    planes: tuple[tuple[int, int | None] | None, ...] = ()
    """For each slice its file (number in ``paths``) and frame; None where one is missing and to be interpolated.

    Of a NIfTI file with several volumes, the number of this one in place of a frame.
    """
    affine: Affine | None = None
    """Of the stack of slices; the other kinds carry theirs in the file."""
    notes: tuple[str, ...] = ()
    technical: Technical = field(default_factory=dict)
    decoded_bytes: int = 0
    """How much memory its voxels take, as its headers say."""
    slice_bytes: int = 0
    """Of this what one slice takes, or the largest object of several slices."""
    prefer: str = ""
    """``sform`` or ``qform``: decides where a NIfTI's two forms differ."""

    @property
    def is_long(self) -> bool:
        """Whether its voxels belong on disk while a volume is made of them."""
        return self.decoded_bytes > SCANNED_BYTES * limits.WHOLE_VOXELS

    @property
    def place(self) -> SourcePlace:
        """The file, or the folder of the first slice."""
        return self.paths[0] if self.kind == "nifti" or len(self.paths) == 1 else self.paths[0].parent

    @property
    def name(self) -> str:
        """What to call the source in messages: its place as text."""
        return str(self.place)
