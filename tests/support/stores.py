"""Small real stores for tests, written by the code that ingest uses."""

from __future__ import annotations

import uuid

import numpy as np

from maesil.geometry import spacing_of, straight
from maesil.store.index import write_index
from maesil.store.recipe import Recipe
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.store.writer import Image, write_attempt
from maesil.types import AIR_HU, MAP_CELL


def cells(mask: np.ndarray) -> np.ndarray:
    """Share, 0..255, of True voxels in each 8^3 cell; what lies beyond the mask counts as False."""
    padded = np.pad(mask, [(0, -n % MAP_CELL) for n in mask.shape])
    z, y, x = (n // MAP_CELL for n in padded.shape)
    share = padded.reshape(z, MAP_CELL, y, MAP_CELL, x, MAP_CELL).mean(axis=(1, 3, 5))
    return np.rint(share * 255).astype(np.uint8)


def synthetic_hu(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """A soft-tissue ellipsoid with a lung and noise inside air: int16 HU."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    shift = rng.uniform(-0.1, 0.1, 3)
    body = (z * 0.6) ** 2 + (y - shift[1]) ** 2 / 0.7 + (x - shift[2]) ** 2 / 0.85 < 0.9
    lung = (z - 0.2) ** 2 / 0.5 + y**2 / 0.2 + (x - 0.4) ** 2 / 0.1 < 1
    hu = np.where(lung & body, -800.0, np.where(body, 40.0 + 30 * np.sin(5 * z + shift[0]), -1000.0))
    return np.clip(np.rint(hu + rng.normal(0, 10, shape)), AIR_HU, 3071).astype(np.int16)


def add_volume(
    store: Store,
    hu: np.ndarray,
    *,
    name: str = "volume",
    group: str | None = None,
    valid: np.ndarray | None = None,
    body: np.ndarray | None = None,
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    affine: np.ndarray | None = None,
    notes: tuple[str, ...] = (),
    source: dict[str, str | float] | None = None,
) -> Volume:
    """Write and commit one int16 HU volume; ``valid`` and ``body`` are voxel masks (default: all; HU > -950).

    ``affine`` says where it lies; without one it has this ``spacing``, and begins at the origin.
    """
    volume_id = uuid.uuid5(uuid.NAMESPACE_OID, name).hex
    attempt = uuid.uuid4().hex
    affine = straight(spacing, (0.0, 0.0, 0.0)) if affine is None else affine
    spacing = spacing_of(affine)
    valid = np.ones(hu.shape, bool) if valid is None else valid
    body = (hu > -950) & valid if body is None else body
    image = Image(hu=hu, affine=affine, valid=cells(valid), body=cells(body))
    tile, codec = store.recipe.superpatch, store.recipe.codec
    patches, documents = write_attempt(store.storage, volume_id, attempt, image, tile=tile, codec=codec)
    return store.commit(
        Volume(
            volume_id=volume_id,
            group=group or volume_id,
            attempt=attempt,
            source_hash=uuid.uuid5(uuid.NAMESPACE_OID, name + str(hu.sum())).hex,
            recipe_hash=store.recipe_hash,
            source_path="0" * 32,
            shape=hu.shape,
            affine_lps=tuple(tuple(row) for row in affine.tolist()),
            spacing=spacing,
            source_shape=hu.shape,
            source_spacing=spacing,
            tile=tile,
            codec=codec,
            source=source or {"kind": "test"},
            notes=notes,
            hu={"mean": float(hu.mean()), "std": float(hu.std()), "valid_share": 1.0, "body_share": 0.5},
            superpatches=patches,
            documents=documents,
        )
    )


def make_store(
    path: StorePlace,
    shapes: list[tuple[int, int, int]],
    *,
    superpatch: int = 32,
    codec: str = "fast",
    seed: int = 0,
) -> Store:
    """A store of one synthetic patient a shape (`synthetic_hu`), indexed."""
    recipe = Recipe(spacing=None, superpatch=superpatch, codec=codec)
    store = Store.create(path, recipe, key_fingerprint="0" * 16)
    for number, shape in enumerate(shapes):
        add_volume(store, synthetic_hu(shape, seed + number), name=f"volume-{seed + number}")
    write_index(store)
    return store
