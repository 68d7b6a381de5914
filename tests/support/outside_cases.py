"""All outside cases by name."""

from support import (
    outside_bombs,
    outside_containers,
    outside_encodings,
    outside_enhanced,
    outside_geometry,
    outside_nifti_headers,
    outside_nifti_values,
    outside_objects,
    outside_phases,
    outside_values,
)
from support.outside_case import CASES

MODULES = (
    outside_geometry,
    outside_phases,
    outside_objects,
    outside_values,
    outside_enhanced,
    outside_encodings,
    outside_containers,
    outside_bombs,
    outside_nifti_headers,
    outside_nifti_values,
)
"""Where they are written; importing them registers them."""

__all__ = ["CASES", "MODULES"]
