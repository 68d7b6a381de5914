"""Executors: every item yields once, errors come back as they are, and a worker that dies costs its item only."""

from __future__ import annotations

import os
import pickle
import warnings

import pytest
from distributed import get_worker

from maesil.errors import Refused, StoreError
from maesil.ingest.execute import executor


def task(kind: str, number: int) -> int:
    if kind == "refuse":
        raise Refused("gap", "missing", after_mm=[1.5])
    if kind == "break":
        raise StoreError("broken")
    if kind == "memory":
        raise MemoryError
    if kind == "die":
        os._exit(1)
    return number * number


def outcomes(run) -> dict[int, object]:
    found = list(run)
    assert len(found) == len({number for number, _ in found})
    return dict(found)


def check(found: dict[int, object], items: list[tuple[str, int]]) -> None:
    assert sorted(found) == list(range(len(items)))
    for number, (kind, value) in enumerate(items):
        result = found[number]
        if kind == "ok":
            assert result == value * value
        elif kind == "refuse":
            assert isinstance(result, Refused)
            assert (result.code, result.detail, result.numbers) == ("gap", "missing", {"after_mm": [1.5]})
        elif kind == "die":
            assert type(result).__name__ == "KilledWorker"
        else:
            assert isinstance(result, {"break": StoreError, "memory": MemoryError}[kind])


ITEMS = [("ok", 1), ("refuse", 2), ("break", 3), ("ok", 4), ("memory", 5), *[("ok", n) for n in range(6, 12)]]


def test_in_this_process():
    with executor(0) as workers:
        check(outcomes(workers.run(task, ITEMS)), ITEMS)
        assert list(workers.run(task, [])) == []
        assert workers.threads >= 1


@pytest.mark.slow
def test_on_a_cluster():
    """One worker, so that others wait behind the task that kills it: they are not to blame. Two clusters get along."""
    items = [*ITEMS[:3], ("die", 12), *[("ok", n) for n in range(13, 16)], *ITEMS]
    with executor(1) as workers, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a port that is taken is nobody's business
        assert list(workers.run(task, [])) == []  # starts nothing
        check(outcomes(workers.run(task, items)), items)
        with executor(1) as others:
            check(outcomes(others.run(task, ITEMS[:2])), ITEMS[:2])
        check(outcomes(workers.run(task, ITEMS)), ITEMS)


def jobs_of_the_worker(_: object) -> list[str]:
    return sorted(get_worker().periodic_callbacks)


@pytest.mark.slow
def test_workers_run_no_profiler_which_can_stop_them_for_ever():
    with executor(1) as workers:
        ((_, jobs),) = workers.run(jobs_of_the_worker, [(None,)])
    assert "heartbeat" in jobs and not [name for name in jobs if "profile" in name]


def test_refusals_survive_pickling():
    refusal = pickle.loads(pickle.dumps(Refused("gap", "one missing", missing=[3])))
    assert (refusal.code, refusal.detail, refusal.numbers, str(refusal)) == (
        "gap", "one missing", {"missing": [3]}, "gap: one missing",
    )  # fmt: skip
