"""Who is trained on, validated on and scored: patients, drawn by hash, and frozen to a file on request."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maesil.documents import as_json, read_json, write_json
from maesil.errors import UsageError
from maesil.text import counted


@dataclass(frozen=True)
class Split:
    """Patient groups trained on and held out; nobody is in both."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...] = ()
    """Set aside from both, for scores."""
    unused: tuple[str, ...] = ()
    """Meant for training, but they give no crop: nothing was learnt from them."""


PARTS = ("train", "validation", "test")


def split_groups(groups: Iterable[str], share: float, seed: int) -> Split:
    """Hold out a share of the patient groups, those of the lowest SHA-256 of (seed, group).

    At least one where there are two or more, none of a single one or for a share of 0, never all.
    """
    ranked = _ranked(groups, seed)
    held_out = 0
    if share > 0 and len(ranked) > 1:
        held_out = min(max(1, math.floor(share * len(ranked) + 0.5)), len(ranked) - 1)
    return Split(train=tuple(sorted(ranked[held_out:])), validation=tuple(sorted(ranked[:held_out])))


def split_patients(patients: Mapping[str, str], share: float, seed: int) -> Split:
    """Hold out a share of the patients as `split_groups` does; groups that share a scan stay together.

    ``patients`` maps each group to the one that stands for its patient (`maesil.store.index.patients`).
    """
    return _with_members(split_groups(patients.values(), share, seed), patients)


def split_by_shares(patients: Mapping[str, str], shares: Sequence[float], seed: int) -> Split:
    """Split the patients into training, validation and test by shares that sum to 1; none that is asked for is empty.

    UsageError for other shares, or fewer patients than parts.
    """
    sum_to_1 = abs(sum(shares) - 1) <= 1e-6  # those with a NaN do not
    if len(shares) not in (2, 3) or min(shares) < 0 or not shares[0] or not sum_to_1:
        raise UsageError(f"--shares: expected two or three shares that sum to 1, as 0.8,0.1,0.1, found {shares}")
    shares = [*shares, 0.0][:3]
    ranked = _ranked(patients.values(), seed)
    counts = [max(1, math.floor(share * len(ranked) + 0.5)) if share else 0 for share in shares[1:]]
    if sum(counts) >= len(ranked):
        raise UsageError(f"--shares: expected more patients than parts, found {counted(len(ranked), 'patient')}")
    validation, test = counts
    held, tested = ranked[:validation], ranked[validation : validation + test]
    return _with_members(Split(tuple(ranked[validation + test :]), tuple(held), tuple(tested)), patients)


def parse_shares(text: str) -> list[float]:
    """Return the shares of ``0.8,0.1,0.1``."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--shares: expected numbers such as 0.8,0.1,0.1, found {text!r}") from None


def write_split(path: Path, split: Split, stores: Sequence[str]) -> None:
    """Freeze a split to a JSON file: keyed hashes of patients, no identity; ``stores`` are fingerprints.

    UsageError where the file holds anything else already: scores hang on a frozen split.
    """
    document = as_json({**{name: getattr(split, name) for name in PARTS}, "stores": list(stores)})
    if path.is_file() and read_json(path) != document:
        raise UsageError(f"{path}: expected no file, or this very split, found another; remove it, or name another")
    write_json(path, document)


def read_split(path: Path, patients: Mapping[str, str]) -> tuple[Split, int]:
    """Return the split of a file for the patients there are, and how many of them it knows nothing of (left out).

    A copy of a known scan goes where that scan is. UsageError for a file that is no split, that puts one patient on
    both sides, or whose training patients are all elsewhere. ``split.json`` of a run is such a file.
    """
    part_of = parts_by_group(path)
    parts_of_patient: dict[str, set[str]] = {leader: set() for leader in patients.values()}
    for group, leader in patients.items():
        if group in part_of:
            parts_of_patient[leader].add(part_of[group])
    for leader, parts in parts_of_patient.items():
        if len(parts) > 1:
            both = [group for group in patients if patients[group] == leader and group in part_of]
            raise UsageError(
                f"{path}: {' and '.join(group[:12] for group in both)} are in {' and '.join(sorted(parts))}, but hold "
                "the same scan; put them into one part"
            )
    members = {name: [group for group, p in patients.items() if parts_of_patient[p] == {name}] for name in PARTS}
    split = Split(**{name: tuple(sorted(groups)) for name, groups in members.items()})
    if not split.train:
        raise UsageError(
            f"{path}: none of its training patients is in the stores; it was made for others, or with another key"
        )
    return split, sum(not parts for parts in parts_of_patient.values())


def parts_by_group(path: Path) -> dict[str, str]:
    """Return the part of each patient group in a file; UsageError for one that is no split.

    Patients that a run meant to train on, but could cut no crop of, count as trained on.
    """
    try:
        document = read_json(path)
        parts = {name: list(document[name]) for name in PARTS if name in document or name != "test"}
        parts["train"] += document.get("unused", [])  # of a run that could cut no crop of them; another one may
        listed = [group for groups in parts.values() for group in groups]
        if not all(isinstance(group, str) for group in listed):
            raise ValueError("groups are texts")
    except OSError as error:
        raise UsageError(f"{path}: cannot read the split ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: expected a split made by `maesil store split` (train, validation, test), found another file"
        ) from error
    if len(set(listed)) != len(listed):
        raise UsageError(f"{path}: a patient group is listed twice; name each in one part")
    return {group: name for name, groups in parts.items() for group in groups}


def _ranked(groups: Iterable[str], seed: int) -> list[str]:
    return sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).hexdigest())


def _with_members(split: Split, patients: Mapping[str, str]) -> Split:
    """Replace each leading group by all groups of its patient."""
    chosen = {leader: name for name in PARTS for leader in getattr(split, name)}
    return Split(**{name: tuple(sorted(g for g, p in patients.items() if chosen[p] == name)) for name in PARTS})
