"""Ridge regression out of sums is ridge regression; scores are what textbooks say."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from maesil.downstream.ridge import PENALTIES, Moments, auroc, fit, r_squared, ridge, sum_of


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(300, 7)) * rng.uniform(0.1, 9, 7) + rng.uniform(-50, 50, 7)).astype(np.float32)
    return x, (x @ rng.normal(size=(7, 3)) * 0.1 + rng.normal(size=(300, 3))).astype(np.float32)


def test_without_a_penalty_it_is_least_squares(data):
    x, y = data
    (model,) = ridge(Moments.of(x, y), [1e-12])
    with_offset = np.c_[x.astype(float), np.ones(len(x))]
    weights, *_ = np.linalg.lstsq(with_offset, y.astype(float), rcond=None)
    np.testing.assert_allclose(model(x), with_offset @ weights, rtol=1e-5, atol=1e-5)


def test_with_a_penalty_it_is_the_ridge_of_scikit_learn_on_standardised_features(data):
    x, y = (values.astype(float) for values in data)
    for penalty, model in zip(PENALTIES, ridge(Moments.of(*data), PENALTIES), strict=True):
        theirs = make_pipeline(StandardScaler(), Ridge(alpha=penalty * len(x))).fit(x, y)
        np.testing.assert_allclose(model(x), theirs.predict(x), rtol=1e-5, atol=1e-5)


def test_sets_add_up_and_errors_come_from_sums_alone(data):
    x, y = data
    whole, parts = Moments.of(x, y), [Moments.of(x[a:b], y[a:b]) for a, b in ((0, 90), (90, 91), (91, 300))]
    for name, value in vars(sum_of(parts)).items():
        np.testing.assert_allclose(value, vars(whole)[name])
    (model,) = ridge(parts[0], [0.1])
    assert parts[2].squared_error(model) == pytest.approx(float(((y[91:] - model(x[91:])) ** 2).sum()), rel=1e-6)


def test_the_penalty_is_chosen_by_what_was_left_out():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(40, 1))

    def patient(n: int) -> Moments:  # hardly more patches than features, and noise: a small penalty overfits
        x = rng.normal(size=(n, 40))
        return Moments.of(x.astype(np.float32), (x @ truth * 0.05 + rng.normal(size=(n, 1))).astype(np.float32))

    parts = [patient(25) for _ in range(4)]
    chosen = fit(parts)
    fresh = patient(20_000)
    errors = [fresh.squared_error(model) for model in ridge(sum_of(parts), PENALTIES)]
    assert fresh.squared_error(chosen) == pytest.approx(min(errors), rel=0.02)
    assert np.array_equal(fit(parts[:1]).weights_DK, ridge(parts[0], [1e-2])[0].weights_DK)


def test_constant_and_repeated_features_do_no_harm():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 3)).astype(np.float32)
    x = np.c_[x, x[:, :1], np.full(50, 7, np.float32)]
    y = x[:, :1].copy()
    predicted = fit([Moments.of(x[:25], y[:25]), Moments.of(x[25:], y[25:])])(x)
    assert r_squared(y[:, 0].astype(float), predicted[:, 0]) > 0.999


def test_r_squared():
    truth = np.array([0.0, 1.0, 2.0, 3.0])
    assert r_squared(truth, truth) == 1
    assert r_squared(truth, np.full(4, 1.5)) == 0
    assert r_squared(truth, truth[::-1]) == -3
    assert r_squared(truth, np.array([0.0, 1.0, 2.0, 5.0])) == pytest.approx(1 - 4 / 5)
    assert r_squared(np.full(4, 0.1), truth) is None


def test_auroc_counts_pairs():
    rng = np.random.default_rng(3)
    positive, score = rng.random(60) < 0.3, np.round(rng.random(60), 1)  # many ties
    pairs = [(p > n) + 0.5 * (p == n) for p in score[positive] for n in score[~positive]]
    assert auroc(positive, score) == pytest.approx(np.mean(pairs))
    assert auroc(np.zeros(5, bool), score[:5]) is None and auroc(np.ones(5, bool), score[:5]) is None
