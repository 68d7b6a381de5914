"""Stores of many volumes without a voxel: commits, as ingest writes them, of shards that are not there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from maesil.store.recipe import Recipe
from maesil.store.records import Superpatch, Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace

TILE = 128
_DOCUMENTS = (
    "zarr.json", "0/zarr.json", "1/zarr.json", "1/c/0/0/0", "2/zarr.json", "2/c/0/0/0",
    "valid/zarr.json", "body/zarr.json", "thumbnail/zarr.json",
)  # fmt: skip


def fake_volume(number: int, recipe_hash: str, superpatches: int = 17, *, state: int = 0) -> Volume:
    """A record as ingest writes it; another ``state`` of a source has another hash and other bytes."""
    rng = np.random.default_rng([number, state])
    volume_id, attempt = (hashlib.sha256(f"{what} {number}".encode()).hexdigest()[:32] for what in ("v", f"a{state}"))
    prefix = f"volumes/{volume_id[:2]}/{volume_id}/{attempt}"
    shares = np.round(rng.random((superpatches, 3)), 6).tolist()
    lengths = rng.integers(1_200_000, 2_400_000, superpatches).tolist()
    crcs = rng.integers(0, 2**32, superpatches).tolist()
    offsets = np.cumsum([0, *lengths]).tolist()
    patches = tuple(
        Superpatch((n // 4, n // 2 % 2, n % 2), f"{prefix}/0/c/0/0/0", offsets[n], lengths[n], crcs[n], *shares[n])
        for n in range(superpatches)
    )
    step = float(rng.choice([0.7, 1.0, 1.5, 3.0]))
    names = ("min", "p01", "median", "p99", "max", "mean", "std", "valid_share", "body_share")
    return Volume(
        volume_id=volume_id,
        group=hashlib.sha256(f"p {number // 2}".encode()).hexdigest()[:32],
        attempt=attempt,
        source_hash=hashlib.sha256(f"{number} {state}".encode()).hexdigest(),
        recipe_hash=recipe_hash,
        source_path=hashlib.sha256(f"path {number}".encode()).hexdigest()[:32],
        shape=(-(-superpatches // 4) * TILE, 2 * TILE, 2 * TILE),
        affine_lps=((0.0, 0.0, 1.5, -180.0), (0.0, 1.5, 0.0, -200.0), (1.5, 0.0, 0.0, 30.5), (0.0, 0.0, 0.0, 1.0)),
        spacing=(1.5, 1.5, 1.5),
        source_shape=(300, 512, 512),
        source_spacing=(step, 0.7, 0.7),
        tile=TILE,
        codec="fast",
        source={"kind": "dicom", "Modality": "CT", "Manufacturer": "fake", "KVP": 120.0, "SliceThickness": step},
        hu={name: float(value) for name, value in zip(names, np.round(rng.random(len(names)), 4), strict=True)},
        notes=("lossy",) if number % 7 == 0 else (),
        superpatches=patches,
        documents=dict(zip(_DOCUMENTS, rng.integers(0, 2**32, len(_DOCUMENTS)).tolist(), strict=True)),
        generation=1,
    )


def fake_store(path: StorePlace, volumes: int, superpatches: int = 1) -> Store:
    """A store of fake commits without a table, written as fast as can be: on a disk without waiting for it."""
    store = Store.create(path, Recipe(spacing=None, superpatch=TILE), key_fingerprint="0" * 16)
    fakes: Iterator[Volume] = (fake_volume(number, store.recipe_hash, superpatches) for number in range(volumes))
    if isinstance(store.path, Path):
        for volume in fakes:
            (store.path / volume.key).parent.mkdir(parents=True)
            (store.path / volume.key).write_bytes(volume.to_json())
        return store
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda volume: store.storage.put(volume.key, volume.to_json()), fakes))
    return store
