"""How the losses of a resumed run are compared with those before the kill."""

from __future__ import annotations

import pytest
from gpu.training import compared


def records(*losses: float, seconds: float) -> list[dict]:
    return [{"step": step, "loss": loss, "seconds": seconds} for step, loss in enumerate(losses, start=1)]


def test_only_steps_that_were_taken_twice_are_compared():
    before = records(1.0, 0.5, 0.4, 0.25, seconds=2.0)
    after = [*before[:2], *records(0, 0, 0.4, 0.26, 0.1, seconds=3.0)[2:]]  # the checkpoint was of step 2
    found = {row["what"]: row["value"] for row in compared(before, after)}
    assert found == {
        "losses compared after the resume": 2, "of them equal to the bit": 1, "largest difference, relative": 0.04,
    }  # fmt: skip


def test_a_resume_that_takes_no_step_again_shows_nothing():
    before = records(1.0, 0.5, seconds=2.0)
    with pytest.raises(RuntimeError, match="found none"):
        list(compared(before, before))
