"""A phantom with a corner whose place is known, in a store; a server of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from support.stores import add_volume

from maesil.geometry import world_of
from maesil.store.index import write_index
from maesil.store.labels import add_label_image
from maesil.store.recipe import Recipe
from maesil.store.records import Refusal, Volume
from maesil.store.store import Store
from maesil.viewer.served_store import ServedStore
from maesil.viewer.server import ViewServer

CORNER_LPS = np.array([45.0, -160.0, 512.0])
"""Centre of a bright cube: left, before and below the middle of the phantom (mm)."""
CUBE_MM, CUBE_HU = 16.0, 1500


def turned_affine(spacing=(3.0, 2.0, 2.5), about_z=20.0, about_x=12.0, origin=(-60.0, -215.0, 470.0)) -> np.ndarray:
    """Axes z, y, x near S, P, L, but turned by these degrees."""
    a, b = np.radians([about_z, about_x])
    around_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    around_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = (around_z @ around_x)[:, ::-1] * spacing
    affine[:3, 3] = origin
    return affine


def phantom(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """A body of 40 HU in air, and the cube, its edges along the patient's axes."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    lps = world_of(affine, index)
    middle = world_of(affine, [(n - 1) / 2 for n in shape])
    hu = np.where(np.linalg.norm((lps - middle) / (75, 55, 60), axis=-1) < 1, 40, -1000)
    cube = (np.abs(lps - CORNER_LPS) <= CUBE_MM / 2).all(axis=-1)
    assert cube.any()
    return np.where(cube, CUBE_HU, hu).astype(np.int16)


def store_of_phantoms(path) -> Store:
    """One phantom that lies turned, one that lies straight, and one source that was refused."""
    store = Store.create(path, Recipe(spacing=None, superpatch=32, codec="fast"), key_fingerprint="0" * 16)
    straight = turned_affine(about_z=0, about_x=0)
    for name, affine in (("turned", turned_affine()), ("straight", straight)):
        shape = (52, 70, 65)
        add_volume(store, phantom(shape, affine), name=name, affine=affine, notes=("sheared",) * (name == "turned"))
    store.quarantine(Refusal("f" * 32, "gap", "a <gap> of 10 mm"))
    write_index(store)
    return store


def labelled(path) -> tuple[Store, Volume, np.ndarray]:
    """A store of one turned volume with labels: an organ at the left of the patient, a lesion in it."""
    store = Store.create(path / "s", Recipe(spacing=None, superpatch=32), key_fingerprint="0" * 16)
    affine = turned_affine()
    volume = add_volume(store, phantom((52, 70, 65), affine), affine=affine)
    labels = np.zeros(volume.shape, np.uint8)
    labels[10:40, 20:50, 40:60], labels[20:24, 30:34, 44:48], labels[0] = 1, 2, 255
    found = add_label_image(store, volume, "organs", labels, ["<liver>", "lesion"], 255)
    assert found is not None
    return store, found, labels


def serving(store: Store, sources=None) -> Iterator[ViewServer]:
    with ViewServer(ServedStore(store, sources)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
