"""How large a CT can be: what claims more is refused before anything is decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from maesil.errors import Refused

MAX_EDGE = 8192
"""Rows or columns."""
MAX_VOXELS = 2**33
"""More than any scanner makes: 8192 slices of 1024 x 1024, or 2048 of 2048 x 2048."""
WHOLE_VOXELS = 2**28
"""A volume of more voxels lies in a temporary file while it is made, and not in memory."""
MIN_SPACING_MM, MAX_SPACING_MM = 0.01, 100.0


def check_voxels(shape: Sequence[int]) -> None:
    """Raise `Refused` for a volume without voxels or with more than a CT has."""
    if min(shape, default=0) <= 0 or math.prod(int(n) for n in shape) > MAX_VOXELS:
        found = "x".join(map(str, shape))
        raise Refused("size_limit", f"expected 1 to {MAX_VOXELS} voxels, found {found}")
