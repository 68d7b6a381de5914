"""maesil: from folders of CT to a pre-trained 3D masked autoencoder (arXiv 2604.00514)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maesil.dataset import SuperpatchDataset as SuperpatchDataset
    from maesil.export import load_encoder as load_encoder

__version__ = "0.1.0"

_LAZY = {"SuperpatchDataset": "maesil.dataset", "load_encoder": "maesil.export"}
"""Where the names live that need torch: `import maesil` alone stays light."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
