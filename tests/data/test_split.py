"""Splits: whole patients, copies of a scan together, the same for the same seed, and frozen as written."""

from __future__ import annotations

import json

import pytest

from maesil.data.split import (
    PARTS,
    Split,
    parse_shares,
    read_split,
    split_by_shares,
    split_groups,
    split_patients,
    write_split,
)
from maesil.errors import DamagedError, UsageError

PATIENTS = {f"g{n:02}": f"g{n - n % 2:02}" for n in range(40)}
"""Twenty patients of two groups each."""


def together(split: Split) -> bool:
    part = {group: name for name in PARTS for group in getattr(split, name)}
    return all(part[group] == part[leader] for group, leader in PATIENTS.items())


@pytest.mark.parametrize(("shares", "counts"), [
    ([0.8, 0.1, 0.1], (32, 4, 4)), ([0.5, 0.25, 0.25], (20, 10, 10)), ([0.9, 0.1], (36, 4, 0)),
    ([1.0, 0.0], (40, 0, 0)), ([0.98, 0.01, 0.01], (36, 2, 2)),
])  # fmt: skip
def test_shares_are_of_patients_and_nobody_is_lost(shares, counts):
    split = split_by_shares(PATIENTS, shares, seed=1)
    assert tuple(len(getattr(split, name)) for name in PARTS) == counts and together(split)
    assert sorted((*split.train, *split.validation, *split.test)) == sorted(PATIENTS)
    assert split == split_by_shares(dict(reversed(PATIENTS.items())), shares, seed=1)
    assert counts[1] == 0 or split != split_by_shares(PATIENTS, shares, seed=2)


def test_a_split_for_training_keeps_patients_together_and_is_that_of_groups_where_all_differ():
    assert together(split_patients(PATIENTS, 0.2, seed=0))
    alone = {group: group for group in PATIENTS}
    assert split_patients(alone, 0.2, seed=3) == split_groups(PATIENTS, 0.2, seed=3)


@pytest.mark.parametrize(
    "shares", ["", "a", "0.5", "0.5,0.4", "1.2,-0.2", "0,0.5,0.5", "0.25,0.25,0.25,0.25", "nan,0.5,0.5"]
)
def test_other_shares_are_refused(shares):
    with pytest.raises(UsageError, match="--shares"):
        split_by_shares(PATIENTS, parse_shares(shares), seed=0)
    with pytest.raises(UsageError, match="found 2 patients"):
        split_by_shares({"a": "a", "b": "b"}, [0.8, 0.1, 0.1], seed=0)


@pytest.fixture
def frozen(tmp_path):
    split = split_by_shares(PATIENTS, [0.6, 0.2, 0.2], seed=0)
    write_split(tmp_path / "split.json", split, ["f"])
    return tmp_path / "split.json", split


def test_a_frozen_split_comes_back_whoever_came_since(frozen):
    path, split = frozen
    assert read_split(path, PATIENTS) == (split, 0)
    copy_of = split.test[0]
    more = {**PATIENTS, "new": "new", "copy": PATIENTS[copy_of]}
    again, unknown = read_split(path, more)
    assert unknown == 1 and again == Split(split.train, split.validation, tuple(sorted((*split.test, "copy"))))
    some = {group: leader for group, leader in PATIENTS.items() if leader < "g20"}
    assert set(read_split(path, some)[0].train) == set(split.train) & set(some)


def test_a_frozen_split_is_not_replaced(tmp_path):
    path = tmp_path / "split.json"
    for _ in range(2):
        write_split(path, split_by_shares(PATIENTS, [0.5, 0.5], seed=0), ["f"])
    before = path.read_bytes()
    with pytest.raises(UsageError, match="found another"):
        write_split(path, split_by_shares(PATIENTS, [0.5, 0.5], seed=1), ["f"])
    assert path.read_bytes() == before


def test_one_scan_on_both_sides_is_refused(frozen):
    path, split = frozen
    for leader in ("z", split.train[0]):
        one = {**PATIENTS, **dict.fromkeys((split.train[0], split.test[0]), leader)}
        with pytest.raises(UsageError, match=r"are in test and train, but hold the same scan"):
            read_split(path, one)


def test_a_split_of_other_stores_is_refused(frozen):
    with pytest.raises(UsageError, match="another key"):
        read_split(frozen[0], {"x": "x"})


def test_a_split_that_was_cut_short_or_altered_is_damaged_and_not_replaced(frozen):
    path, split = frozen
    whole = path.read_text()
    for content in ("", whole[:40], whole.replace(split.train[0], split.test[0])):
        path.write_text(content)
        with pytest.raises(DamagedError, match="found it damaged"):
            read_split(path, PATIENTS)
        with pytest.raises(DamagedError, match="found it damaged"):
            write_split(path, split, ["f"])
        assert path.read_text() == content


@pytest.mark.parametrize("content", ["{}", '{"train": "a"}', '{"train": [1], "validation": []}'])
def test_what_is_no_split_is_refused(tmp_path, content):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UsageError, match="expected a split"):
        read_split(tmp_path / "s.json", PATIENTS)


def test_a_group_listed_twice_and_a_missing_file(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"train": ["g00"], "validation": ["g00"]}))
    with pytest.raises(UsageError, match="twice"):
        read_split(tmp_path / "s.json", PATIENTS)
    with pytest.raises(UsageError, match="cannot read"):
        read_split(tmp_path / "none.json", PATIENTS)
