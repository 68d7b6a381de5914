"""Whom `maesil prove` learns from and whom it scores: nobody whom an encoder was trained on, under any name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maesil.data.known_scans import EARLIER, known_scans
from maesil.data.overlap import overlaps
from maesil.data.split import Split, read_split
from maesil.downstream.labels import labelled
from maesil.errors import UsageError
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.text import counted
from maesil.training.checkpoint import Run

Part = Literal["validation", "test"]
PARTS: tuple[Part, ...] = ("validation", "test")
_SHARE = 0.25
"""Of the unseen labelled patients, for each of the two parts, where no split says who is in which."""


@dataclass(frozen=True)
class Cohort:
    """Labelled patients by name (a patient group), each with the labelled volumes."""

    learnt: dict[str, tuple[Volume, ...]]
    scored: dict[str, tuple[Volume, ...]]
    notes: tuple[str, ...] = ()

    def volumes(self) -> list[Volume]:
        """Return all volumes: those that are learnt from, then those that are scored."""
        return [volume for some in (self.learnt, self.scored) for patient in some.values() for volume in patient]

    def patient_of(self) -> dict[str, str]:
        """Return the patient of each volume id."""
        everyone = {**self.learnt, **self.scored}
        return {volume.volume_id: name for name, volumes in everyone.items() for volume in volumes}


def choose_cohort(
    store: Store,
    labels_dir: Path,
    runs: Mapping[Path, Run],
    part: Part,
    split_file: Path | None,
    seed: int,
    *,
    include_trained: bool,
) -> Cohort:
    """Choose by a file of `maesil store split`, or by hash among the labelled patients that no run was trained on.

    Only labelled patients count. UsageError where a scan of a scored patient is learnt from under another name, where a
    run was trained on it (unless ``include_trained``), and where nobody is left to learn from or to score.
    """
    found = labelled(labels_dir, store.volumes())
    known = known_scans(list(runs))
    leaders, notes = known.patients(store)
    here = {volume.group: leaders[volume.group] for volume in store.volumes()}
    groups = {*known.groups("train", EARLIER), *(group for run in runs.values() for group in run.split.train)}
    trained = {leaders.get(group, group) for group in groups}
    by_patient: dict[str, list[Volume]] = {}
    for volume in found:
        by_patient.setdefault(here[volume.group], []).append(volume)
    if split_file:
        split, strangers = read_split(split_file, here)
        notes += (f"{split_file}: says nothing of {counted(strangers, 'patient')}, left out",) * bool(strangers)
    else:
        split = _drawn(list(by_patient), trained, seed, include_trained=include_trained)
    learnt, scored = (
        {name: tuple(by_patient[name]) for name in sorted(by_patient) if name in {here.get(g, g) for g in wanted}}
        for wanted in (split.train, getattr(split, part))
    )
    if not learnt or not scored:
        raise UsageError(
            f"expected labelled patients to learn from and to score (part {part}), found {len(learnt)} and "
            f"{len(scored)} of {counted(len(by_patient), 'labelled patient')}; label others, or give another --split"
        )
    if leaked := sorted(trained & scored.keys()):
        if not include_trained:
            raise UsageError(_leak(store, list(runs), [v for name in leaked for v in scored[name]], len(leaked)))
        notes += (f"{counted(len(leaked), 'scored patient')} trained on (--include-trained): optimistic",)
    return Cohort(learnt, scored, notes)


def _leak(store: Store, runs: Sequence[Path], volumes: Sequence[Volume], patients: int) -> str:
    """Say which scored scans were trained on, and by what sign each is known."""
    signs = {one.volume_id: one.by for one in overlaps(store, [], runs)[0] if one.part != "validation"}
    told = [f"{volume.volume_id[:12]} ({signs.get(volume.volume_id, 'patient')})" for volume in volumes]
    more = ", ..." * (len(told) > 5)
    return (
        f"an encoder was trained on {counted(patients, 'patient')} to be scored: volumes {', '.join(told[:5])}{more}; "
        "score others, or say --include-trained and take the scores as optimistic"
    )


def _drawn(labelled_patients: Sequence[str], trained: set[str], seed: int, *, include_trained: bool) -> Split:
    """Draw validation and test among the labelled patients that may be scored; all others are learnt from."""

    def rank(patient: str) -> str:
        return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()

    unseen = sorted((one for one in labelled_patients if include_trained or one not in trained), key=rank)
    count = max(1, int(_SHARE * len(unseen)))
    if len(unseen) < 2 or len(labelled_patients) < 3:
        raise UsageError(
            "expected three labelled patients, and two that no encoder was trained on (one each for validation and "
            f"test), found {len(labelled_patients)} and {len(unseen)}; label others, or give --split"
        )
    held = {*unseen[: 2 * count]}
    learnt = tuple(one for one in labelled_patients if one not in held)
    return Split(learnt, tuple(unseen[count : 2 * count]), tuple(unseen[:count]))
