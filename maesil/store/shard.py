"""Superpatches inside Zarr v3 shard files: which codecs, where each lies, how one is written, checked and decoded.

Layout: Zarr ``sharding_indexed`` codec, version 1.0. The last ``16 n + 4`` bytes of a shard are its index, the little
endian (offset, length) pairs of its n chunks in C order, and a crc32c; the chunks themselves may lie in any order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from maesil.errors import StoreError
from maesil.store.recipe import CODECS
from maesil.store.records import Superpatch
from maesil.store.storage import Storage
from maesil.types import HuArray, Zyx

_MAX_TILES_PER_SHARD = 64
_LARGE_SHARD = (4, 4, 4)
_ABSENT = 2**64 - 1
_BLOSC: dict[str, dict[str, Any]] = {
    "fast": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "blocksize": 0},
    # An automatic block size (0) halves the speed of decoding.
    "compact": {"cname": "zstd", "clevel": 1, "shuffle": "bitshuffle", "blocksize": 2 << 20},
}
_SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def compressors(codec: str) -> list[Any]:
    """Return the Zarr codecs after ``bytes`` for a codec name of the recipe: crc32c is always the last."""
    return [BloscCodec(typesize=2, **_BLOSC[codec]), Crc32cCodec()] if codec in _BLOSC else [Crc32cCodec()]


def encode(hu: HuArray, codec: str) -> tuple[bytes, bytes]:
    """Return one superpatch (int16, C-contiguous) as those codecs encode it: compressed bytes, and their crc32c."""
    if codec in _BLOSC:
        chosen = _BLOSC[codec]
        shuffle, block = _SHUFFLES[chosen["shuffle"]], chosen["blocksize"]
        compressed = blosc.compress(hu, chosen["cname"].encode(), chosen["clevel"], shuffle, block)
    else:
        compressed = hu.tobytes()
    return compressed, struct.pack("<I", google_crc32c.value(compressed))


def shard_parts(per_shard: Zyx, encoded: Iterable[tuple[Zyx, tuple[bytes, bytes]]]) -> Iterator[bytes]:
    """Yield the bytes of a shard of ``per_shard`` superpatches (z, y, x): those given by their place in it, its index.

    The others are absent: they lie beyond the volume.
    """
    table = np.full((*per_shard, 2), _ABSENT, dtype="<u8")
    offset = 0
    for inner, parts in encoded:
        length = sum(len(part) for part in parts)
        table[inner] = offset, length
        offset += length
        yield from parts
    index = table.tobytes()
    yield index + struct.pack("<I", google_crc32c.value(index))


def tiles_per_shard(grid: Zyx) -> Zyx:
    """Return how many superpatches (z, y, x) one shard file holds for a volume of this grid."""
    return grid if grid[0] * grid[1] * grid[2] <= _MAX_TILES_PER_SHARD else _LARGE_SHARD


def locate(index: Zyx, per_shard: Zyx) -> tuple[str, Zyx]:
    """Return the shard's chunk key (``c/z/y/x``) and the place inside the shard of the superpatch at ``index``."""
    z, y, x = (i // n for i, n in zip(index, per_shard, strict=True))
    inner_z, inner_y, inner_x = (i % n for i, n in zip(index, per_shard, strict=True))
    return f"c/{z}/{y}/{x}", (inner_z, inner_y, inner_x)


def read_shard_index(storage: Storage, key: str, per_shard: Zyx) -> NDArray[np.uint64]:
    """Return a shard's ``[z, y, x, 2]`` table of offsets and lengths (bytes); `StoreError` if it is damaged."""
    count = per_shard[0] * per_shard[1] * per_shard[2]
    length = 16 * count + 4
    size = storage.size(key)
    if size < length:
        raise StoreError(
            f"{storage.root}: {key}: expected at least {length} bytes, found {size}; the shard was emptied"
        )
    data = bytes(storage.read_range(key, size - length, length))
    (stored,) = struct.unpack("<I", data[-4:])
    if google_crc32c.value(data[:-4]) != stored:
        raise StoreError(f"{storage.root}: {key}: the shard's index is damaged (crc32c)")
    return np.frombuffer(data[:-4], dtype="<u8").reshape(*per_shard, 2)


def shard_entry(table: NDArray[np.uint64], inner: Zyx, where: str) -> tuple[int, int]:
    """Return (offset, length) of one chunk from a shard's table; `StoreError` if the chunk is absent."""
    offset, length = (int(value) for value in table[inner])
    if offset == _ABSENT or length == _ABSENT:
        raise StoreError(f"{where}: missing from its shard")
    return offset, length


def decode_superpatch(storage: Storage, patch: Superpatch, codec: str, out: HuArray, where: str) -> None:
    """Read, check and decode one superpatch into ``out`` (int16, C-contiguous, ``[T, T, T]``).

    ``where`` names store, volume and superpatch for the message of the `StoreError` that any damage raises.
    """
    encoded = np.frombuffer(storage.read_range(patch.path, patch.offset, patch.length), dtype=np.uint8)
    check_and_decode(encoded, patch.crc32c, codec, out, f"{where}, {patch.path}")


def check_and_decode(encoded: NDArray[np.uint8], crc32c: int, codec: str, out: HuArray, where: str) -> None:
    """Check the bytes of one chunk, its trailing crc32c included, and decode them into ``out`` (int16, C-contiguous).

    Nothing is copied between the bytes and the voxels. `StoreError`, naming ``where``, for any damage.
    """
    if out.dtype != np.int16 or not out.flags.c_contiguous:
        raise ValueError(f"{where}: expected a C-contiguous int16 buffer, found {out.dtype} with strides {out.strides}")
    payload = encoded[:-4]
    if int.from_bytes(encoded[-4:], "little") != crc32c or google_crc32c.value(payload) != crc32c:
        raise StoreError(f"{where}: checksum mismatch; delete the volume's folder below commits/ and ingest again")
    if codec not in CODECS:
        raise StoreError(f"{where}: expected a codec of {', '.join(CODECS)}, found {codec!r}")
    decoded = len(payload) if codec == "raw" else blosc._cbuffer_sizes(payload)[0]
    if decoded != out.nbytes:
        raise StoreError(f"{where}: expected {out.nbytes} decoded bytes, found {decoded}")
    if codec == "raw":
        out.reshape(-1).view(np.uint8)[:] = payload
    else:
        blosc.decompress(payload, out)
