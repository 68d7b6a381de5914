"""Surface Dice: which share of two surfaces lies within a tolerance of the other one (arXiv 1809.04430).

MONAI computes it (``pip install maesil[prove]``), by the areas of surface elements, as the authors of the score do.
Their own package calls a part of SciPy that is announced to go.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from maesil.installed import not_installed
from maesil.types import Spacing

PACKAGE = ("monai",)


def has_surface_dice() -> bool:
    """Return whether MONAI is there to compute it."""
    return not not_installed(PACKAGE)


def surface_dice(one_ZYX: Tensor, other_ZYX: Tensor, spacing: Spacing, tolerance_mm: float) -> float | None:
    """Return the share of the surfaces of two bool masks within the tolerance; None where neither holds a voxel."""
    some = bool(one_ZYX.any()), bool(other_ZYX.any())
    if not all(some):
        return 0.0 if any(some) else None
    from monai.metrics.surface_dice import compute_surface_dice

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI passes to itself an argument that it gives up
        found = compute_surface_dice(
            one_ZYX[None, None], other_ZYX[None, None], [tolerance_mm], include_background=True,
            spacing=list(spacing), use_subvoxels=True,
        )  # fmt: skip
    return float(found)
