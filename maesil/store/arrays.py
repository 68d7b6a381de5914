"""The arrays of one chunk beside a volume's voxels: the maps of its cells and its thumbnail."""

from __future__ import annotations

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from maesil.documents import parsed_json
from maesil.errors import StoreError
from maesil.store.records import Volume
from maesil.store.storage import Storage

CODECS = ("bytes", "zstd", "crc32c")


def read_small_array(storage: Storage, volume: Volume, name: str) -> NDArray[np.uint8]:
    """Return a whole array, uint8; `StoreError` where its metadata is not what was committed, or its chunk is damaged.

    Decoded here, past zarr-python's set-up of an array: training reads two maps of each volume at its start.
    """
    key = f"{volume.prefix}/{name}"
    try:
        shape = _shape(storage.read(f"{key}/zarr.json"), volume.documents.get(f"{name}/zarr.json"))
        if not storage.exists(f"{key}/c/0/0/0"):
            raise ValueError("its chunk is missing")  # Zarr would read fill values
        return decoded_chunk(storage.read(f"{key}/c/0/0/0")).reshape(shape)
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, OSError, MemoryError) as error:
        raise StoreError(
            f"{storage.root}: volume {volume.volume_id}, {name!r}: damaged ({error}); "
            "delete the volume's folder below commits/ and ingest again"
        ) from error


def _shape(document: bytes, crc32c: int | None) -> tuple[int, ...]:
    """Return the shape from an array's metadata, once it is what this module can decode."""
    if google_crc32c.value(document) != crc32c:
        raise ValueError("its metadata is not what was committed")
    metadata = parsed_json(document)
    codecs = tuple(codec["name"] for codec in metadata["codecs"])
    if codecs != CODECS:
        raise ValueError(f"expected the codecs {', '.join(CODECS)}, found {', '.join(map(str, codecs))}")
    shape, chunk = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    if metadata["data_type"] != "uint8" or chunk != shape:
        raise ValueError(f"expected one chunk of uint8, found {chunk} of {shape}, {metadata['data_type']}")
    return tuple(shape)


def decoded_chunk(chunk: bytes) -> NDArray[np.uint8]:
    """Return the cells of an array's one chunk, in a row; ValueError or RuntimeError where it is damaged."""
    if int.from_bytes(chunk[-4:], "little") != google_crc32c.value(chunk[:-4]):
        raise ValueError("checksum mismatch")
    return np.frombuffer(zstd.decompress(chunk[:-4]), dtype=np.uint8).copy()
