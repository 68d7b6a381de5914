"""Labelled phantoms, a run and a frozen split for tests of `maesil prove`; and functions that are encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from support.labelled import labelled_store
from support.runs import save_run

from maesil.data.known_scans import record_scans
from maesil.data.split import Split, write_split
from maesil.downstream.prove import ProofBudget

SPLIT = Split(("patient-0", "patient-1", "patient-2"), ("patient-3", "patient-4"), ("patient-5",))
TINY = replace(
    ProofBudget.load("tiny"), name="smallest", patches=1200, patients=(2,), steps=2, batch=1, seeds=1, points=1
)


def make_world(folder: Path, shape=(48, 34, 48)):
    """A store of six phantoms, their labels, a split, and a run (never trained) of its training patients."""
    store, labels, volumes = labelled_store(folder, 6, shape)
    write_split(folder / "split.json", SPLIT, [store.fingerprint])
    run = save_run(folder / "run", SPLIT)
    record_scans(run, [store], SPLIT)
    return store, labels, volumes, run, folder / "split.json"


def of_patches(hu: np.ndarray, *, patch: int = 8) -> np.ndarray:
    """Mean and deviation of the HU of each patch: tokens ``[n, 2]``."""
    z, y, x = (n // patch for n in hu.shape)
    cells = hu.reshape(z, patch, y, patch, x, patch).transpose(0, 2, 4, 1, 3, 5).reshape(z * y * x, -1)
    return np.stack([cells.mean(axis=1), cells.std(axis=1)], axis=1) / 1000


def with_class_token(hu: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((1, 2)), of_patches(hu)])
