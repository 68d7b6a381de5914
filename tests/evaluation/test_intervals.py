import numpy as np
import pytest
from scipy.stats import bootstrap

from maesil.evaluation.intervals import paired_difference


def scores(values):
    return {f"patient {number}": float(value) for number, value in enumerate(values)}


def test_the_interval_is_that_of_scipy():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(24, 3, 13), rng.normal(23, 3, 13)
    found = paired_difference(scores(ours), scores(theirs))
    known = bootstrap((ours - theirs,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert found.mean == pytest.approx((ours - theirs).mean()) and found.patients == 13
    assert (found.low, found.high) == pytest.approx(known, abs=0.05)


def test_what_makes_a_patient_hard_for_both_cancels_out():
    theirs = np.array([15.0, 20.0, 30.0, 26.0])
    found = paired_difference(scores(theirs + 1.0), scores(theirs))
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_only_patients_that_both_were_scored_on_count_and_one_is_too_few():
    assert paired_difference({"a": 1.0, "b": 2.0, "c": 9.0}, {"a": 0.0, "b": 0.0, "d": 5.0}).patients == 2
    assert paired_difference({"a": 1.0}, {"a": 0.0}) is None
