"""Phantom patients whose organs are known, in a store, with their labels beside it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
from support.stores import add_volume

from maesil.store.index import write_index
from maesil.store.nifti import write_nifti
from maesil.store.recipe import Recipe
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.synthetic.phantom import ORGANS, ChestPhantom, sample_on_grid

SPACING = (7.0, 7.0, 7.0)


def affine_of(start: tuple[float, float, float] = (-20.0, -120.0, -168.0), spacing=SPACING) -> np.ndarray:
    """A grid whose first voxel lies at ``start`` (z y x, mm)."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing
    affine[:3, 3] = start[::-1]
    return affine


def phantom(seed: int, shape: tuple[int, int, int], affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HU and organ numbers, int16, of a patient on a grid."""
    hu, organs = _sampled(seed, tuple(shape), affine.tobytes())
    return hu.copy(), organs.copy()


@cache
def _sampled(seed: int, shape: tuple[int, int, int], affine: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Once in a process: many modules have the same patients."""
    patient, grid = ChestPhantom(seed), np.frombuffer(affine).reshape(4, 4)
    hu = np.clip(np.rint(sample_on_grid(patient.hu, shape, grid)), -1024, 3071)
    return hu.astype(np.int16), sample_on_grid(patient.organs, shape, grid).astype(np.int16)


def labelled_store(
    folder: Path, patients: int, shape=(48, 34, 48), superpatch: int = 32, spacing=SPACING
) -> tuple[Store, Path, list[Volume]]:
    """A store of phantoms ``patient-0``..., and a folder of their labels by volume id. The store's origin is 0."""
    store = Store.create(folder / "store", Recipe(spacing=None, superpatch=superpatch), key_fingerprint="0" * 16)
    labels, volumes = folder / "labels", []
    for seed in range(patients):
        hu, organs = phantom(seed, shape, affine_of(spacing=spacing))
        name = f"patient-{seed}"
        volumes.append(add_volume(store, hu, name=name, group=name, spacing=spacing))
        write_nifti(labels / f"{volumes[-1].volume_id}.nii.gz", organs, volumes[-1].affine)
    (labels / "classes.json").write_text(json.dumps({str(n): organ for n, organ in enumerate(ORGANS, start=1)}))
    write_index(store)
    return store, labels, volumes
