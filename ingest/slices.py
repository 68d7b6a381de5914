"""Single slices by their headers: which are no part of a volume of HU, and which cannot be placed."""

from __future__ import annotations

import numpy as np

from maesil.codes import RefusalCode
from maesil.errors import Refused
from maesil.ingest.header import InstanceHeader
from maesil.ingest.limits import MAX_EDGE, MAX_SPACING_MM, MIN_SPACING_MM
from maesil.ingest.material import material_named
from maesil.ingest.passes import normal_of

NOT_WANTED: tuple[RefusalCode, ...] = ("localizer", "derived_reformat", "no_slice", "material_map", "colour_picture")
"""Codes of slices that are understood and left aside: the rest of their series is whole without them."""
_NOT_AXIAL_BELOW = 0.8
_COLOURS = 3
_DERIVED_CONTRAST = {
    "MAXIMUM",
    "MINIMUM",
    "MEAN",
    "STD_DEVIATION",
    "SUBTRACTION",
    "MASKED",
    "DIVISION",
    "MULTIPLICATION",
}
"""What Enhanced CT says in the fourth value of a frame's type (PS3.3 C.8.16.1.4): no slices of their own."""
_REFORMAT_WORDS = ("MPR", "REFORMAT", "MIP", "MINIP", "PROJECTION", "VOLUME RENDERING", "VRT", "SCREEN")


def check_slice(header: InstanceHeader, *, include_derived: bool, material_maps: bool = False) -> None:
    """Raise `Refused` for a slice that is not wanted (`NOT_WANTED`) or whose place is not known."""
    _check_kind(header, include_derived, material_maps)
    _check_geometry(header)
    derived = not include_derived and "DERIVED" in header.image_type
    if derived and abs(normal_of(header)[2]) < _NOT_AXIAL_BELOW:
        raise Refused("derived_reformat", "derived, and not axial")


def _check_kind(header: InstanceHeader, include_derived: bool, material_maps: bool) -> None:
    if "LOCALIZER" in header.image_type:
        raise Refused("localizer", "a scout view")
    if not material_maps and (kind := material_named(header)) is not None:
        text = f"a map out of a multi-energy scan ({kind}): its values are no HU"
        raise Refused("material_map", f"{text}; --accept material_map takes it as it is")
    if not include_derived and _is_reformat(header.image_type):
        raise Refused("derived_reformat", "ImageType says that it was made from other slices")
    if header.samples == _COLOURS:
        raise Refused("colour_picture", "three values a pixel: a picture in colour, no HU")
    if header.frame is None and header.frames > 1:
        text = f"expected one frame in an object of the class CT Image Storage, found {header.frames}"
        raise Refused(
            "frames_without_positions",
            f"{text}: where the others lie is not said; export it as single slices or as Enhanced CT",
            frames=header.frames,
        )


def _check_geometry(header: InstanceHeader) -> None:
    for name, value in (
        ("ImagePositionPatient", header.position),
        ("ImageOrientationPatient", header.orientation),
        ("PixelSpacing", header.pixel_spacing),
    ):
        if value is None:
            if has_no_place(header) and "SECONDARY" in header.image_type:
                raise Refused("no_slice", "a secondary image without a place in the patient: a page beside the slices")
            raise Refused("no_geometry", f"expected {name}, found none or not all of its numbers")
    assert header.orientation is not None and header.pixel_spacing is not None
    if not (0 < header.rows <= MAX_EDGE and 0 < header.columns <= MAX_EDGE):
        found = f"{header.rows} x {header.columns}"
        raise Refused("size_limit", f"expected 1 to {MAX_EDGE} rows and columns, found {found}")
    if not all(MIN_SPACING_MM < mm < MAX_SPACING_MM for mm in header.pixel_spacing):
        expected = f"a PixelSpacing of {MIN_SPACING_MM} to {MAX_SPACING_MM:g} mm"
        raise Refused("bad_spacing", f"expected {expected}, found {header.pixel_spacing}")
    row, column = np.asarray(header.orientation[:3]), np.asarray(header.orientation[3:])
    lengths = np.linalg.norm([row, column, np.cross(row, column)], axis=1)
    if (np.abs(lengths - 1) > 0.01).any():
        raise Refused("bad_orientation", f"expected two unit vectors at a right angle, found {header.orientation}")


def has_no_place(header: InstanceHeader) -> bool:
    """Return whether nothing says where in the patient an image lies."""
    return header.position is None and header.orientation is None


def _is_reformat(image_type: tuple[str, ...]) -> bool:
    derived = "DERIVED" in image_type and not _DERIVED_CONTRAST.isdisjoint(image_type)
    return derived or any(word in value for value in image_type for word in _REFORMAT_WORDS)
