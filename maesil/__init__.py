"""maesil: from folders of CT to a pre-trained 3D masked autoencoder (arXiv 2604.00514).

`ingest`, `train` and `evaluate` are the commands as functions. `Store` opens a store, `SuperpatchDataset` reads it in
PyTorch. `read_ct` reads one scan, and `load_encoder` loads what `maesil export` wrote. All are imported when first
used, so that `import maesil` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maesil.api import evaluate, train
    from maesil.data.dataset import SuperpatchDataset
    from maesil.downstream.encoder import Encoder, load_encoder
    from maesil.ingest import Ingest
    from maesil.ingest.read import read_ct
    from maesil.store.store import Store
    from maesil.version import __version__

    ingest: Ingest

__all__ = [
    "Encoder", "Store", "SuperpatchDataset", "__version__", "evaluate", "ingest", "load_encoder", "read_ct", "train",
]  # fmt: skip

_LAZY = {
    "Encoder": "maesil.downstream.encoder",
    "Store": "maesil.store.store",
    "SuperpatchDataset": "maesil.data.dataset",
    "__version__": "maesil.version",
    "evaluate": "maesil.api",
    "load_encoder": "maesil.downstream.encoder",
    "read_ct": "maesil.ingest.read",
    "train": "maesil.api",
}
"""Where the names live. `ingest` is the folder of that name, which can be called (see `maesil.ingest`)."""


def __getattr__(name: str) -> object:
    if name == "ingest":
        return import_module("maesil.ingest")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
