"""The arrays of one chunk beside a volume's voxels: the maps of its cells and its thumbnail."""

from __future__ import annotations

import json
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray

from maesil.commit import Volume
from maesil.errors import StoreError
from maesil.storage import Storage

CODECS = ("bytes", "zstd", "crc32c")
_ZARR_RAISES = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, OSError)
"""What zarr-python raises on damaged metadata and chunks."""


def read_small_array(storage: Storage, volume: Volume, name: str) -> NDArray[Any]:
    """Return a whole array; `StoreError` where its metadata is not what was committed, or its chunk is damaged.

    Zarr would read a missing chunk as fill values, and load whatever codec the metadata names: both are refused.
    """
    key = f"{volume.prefix}/{name}"
    try:
        metadata = storage.read(f"{key}/zarr.json")
        if google_crc32c.value(metadata) != volume.documents.get(f"{name}/zarr.json"):
            raise ValueError("its metadata is not what was committed")
        codecs = tuple(codec["name"] for codec in json.loads(metadata)["codecs"])
        if codecs != CODECS:
            raise ValueError(f"expected the codecs {', '.join(CODECS)}, found {', '.join(map(str, codecs))}")
        if not storage.exists(f"{key}/c/0/0/0"):
            raise ValueError("its chunk is missing")
        return np.asarray(zarr.open_array(storage.zarr(key, read_only=True), mode="r")[:])
    except _ZARR_RAISES as error:
        raise StoreError(
            f"{storage.root}: volume {volume.volume_id}, {name!r}: damaged ({error}); "
            "delete the volume's folder below commits/ and ingest again"
        ) from error
