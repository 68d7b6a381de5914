"""Who is learnt from and who is scored, where labels are few: by patients, or by blocks of the one labelled patient.

Patients are groups of a store; groups that share a scan count as one (`maesil.store.duplicates`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from maesil.errors import UsageError
from maesil.store.records import Volume
from maesil.text import counted
from maesil.types import Edges, Zyx, edges_told, zyx


@dataclass(frozen=True)
class Patients:
    """Labelled patients, each a list of volume ids, in an order that depends on nothing but the seed."""

    unseen: tuple[tuple[str, ...], ...]
    """Those that no compared encoder was trained on: only they are scored."""
    seen: tuple[tuple[str, ...], ...]
    """The others: they may be learnt from."""


def patients_of(
    leader: Mapping[str, str], volumes: Sequence[Volume], trained_on: Set[str], seed: int, *, include_trained: bool
) -> Patients:
    """Sort labelled volumes into patients, and these into unseen and seen; UsageError if nobody is unseen.

    ``leader`` gives the patient of each group: a scan that was trained on, here or elsewhere, may be among the labelled
    ones as another group (`maesil.data.known_scans.KnownScans.patients`). ``include_trained`` counts all as unseen.
    """
    trained = {leader[group] for group in trained_on if group in leader}
    by_patient: dict[str, list[str]] = {}
    for volume in volumes:
        by_patient.setdefault(leader[volume.group], []).append(volume.volume_id)
    ranked = sorted(by_patient, key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest())
    unseen = [patient for patient in ranked if include_trained or patient not in trained]
    if not unseen:
        raise UsageError(
            f"the encoder was trained on {counted(len(ranked), 'labelled patient')}, and there is no other, so nobody "
            "is left to score fairly; label others, or say --include-trained and take the scores as optimistic"
        )
    seen = [patient for patient in ranked if patient not in unseen]
    return Patients(tuple(tuple(by_patient[p]) for p in unseen), tuple(tuple(by_patient[p]) for p in seen))


def longest_axis(shape: Zyx, crop: Edges) -> int:
    """Return the axis along which most crops lie one after another; UsageError where there is one crop only."""
    counts = [-(-n // edge) for n, edge in zip(shape, zyx(crop), strict=True)]
    if max(counts) < 2:
        raise UsageError(
            f"expected two labelled patients, or one whose volume is larger than a crop of {edges_told(crop)} voxels, "
            f"found one of shape {shape}"
        )
    return int(np.argmax(counts))
