"""maesil: from folders of CT to a pre-trained 3D masked autoencoder (arXiv 2604.00514)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maesil.data.dataset import SuperpatchDataset as SuperpatchDataset
    from maesil.downstream.export import load_encoder as load_encoder
    from maesil.version import __version__ as __version__

_LAZY = {
    "SuperpatchDataset": "maesil.data.dataset",
    "load_encoder": "maesil.downstream.export",
    "__version__": "maesil.version",
}
"""Where the names live: `import maesil` alone stays light."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
