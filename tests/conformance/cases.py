"""All outside cases by name."""

from conformance import (
    bombs,
    containers,
    encodings,
    enhanced,
    geometry,
    nifti_headers,
    nifti_values,
    objects,
    phases,
    values,
)
from conformance.case import CASES

MODULES = (
    geometry,
    phases,
    objects,
    values,
    enhanced,
    encodings,
    containers,
    bombs,
    nifti_headers,
    nifti_values,
)
"""Where they are written; importing them registers them."""

__all__ = ["CASES", "MODULES"]
