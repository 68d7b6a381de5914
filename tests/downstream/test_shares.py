"""The linear probe on patients kept apart."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from maesil.downstream.cohort import Cohort
from maesil.downstream.probe import Patches
from maesil.downstream.ridge import Moments, fit, r_squared
from maesil.downstream.scored import SHUFFLED, Rows
from maesil.downstream.shares import score_shares


def patient(rng, n: int = 400) -> Patches:
    shares = rng.random((n, 2)).astype(np.float32) * (rng.random((n, 2)) < 0.5)
    noise = rng.normal(size=(n, 6)).astype(np.float32)
    knowing = (shares @ np.array([[1, 2, 3, 0, 1, 0], [0, 1, 0, 2, 1, 1]]) + 0.01 * noise).astype(np.float32)
    return Patches(np.zeros((n, 3), np.int64), shares, {"knowing": knowing, "noise": noise})


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    looked_at = {f"v{number}": patient(rng) for number in range(8)}
    volume = {name: SimpleNamespace(volume_id=name) for name in looked_at}
    learnt = {f"p{number}": (volume[f"v{number}"],) for number in range(4)}
    scored = {"p4": (volume["v4"], volume["v5"]), "p6": (volume["v6"],), "p7": (volume["v7"],)}
    cohort = Cohort(learnt, scored)
    return looked_at, cohort, Rows(list(score_shares(looked_at, cohort, ["knowing", "noise"], ("a", "b"), 0)))


def test_who_knows_scores_1_who_does_not_scores_0_and_shuffled_labels_score_at_chance(world):
    _, _, rows = world
    assert rows.mean("share_r2", "knowing") > 0.99
    assert abs(rows.mean("share_r2", "noise")) < 0.05
    assert abs(rows.mean("share_r2", SHUFFLED)) < 0.05
    assert {row.patient for row in rows.rows} == {"p4", "p6", "p7"}


def test_the_mean_over_patients_of_equally_many_patches_is_the_r2_of_all(world):
    looked_at, cohort, _ = world
    alike = Cohort(cohort.learnt, {name: volumes[:1] for name, volumes in cohort.scored.items()})
    rows = Rows(list(score_shares(looked_at, alike, ["noise"], ("a", "b"), 0)))
    model = fit([Moments.of(looked_at[v].features["noise"], looked_at[v].shares_NK) for v in ("v0", "v1", "v2", "v3")])
    test = [looked_at[v] for v in ("v4", "v6", "v7")]
    truth = np.concatenate([one.shares_NK for one in test]).astype(np.float64)
    predicted = np.concatenate([model(one.features["noise"]) for one in test])
    expected = [r_squared(truth[:, k], predicted[:, k]) for k in range(2)]
    assert rows.mean("share_r2", "noise") == pytest.approx(np.mean(expected), abs=1e-6)


def test_no_constant_scores_above_0_however_unequal_the_patients_are(world):
    """Found on real scans: a small tumour and two large ones, and shuffled labels scored 0.13."""
    looked_at, cohort, _ = world
    factor = {"v4": (0.05, 3000), "v6": (1, 90), "v7": (1, 60)}
    unequal, rng = dict(looked_at), np.random.default_rng(1)
    for name, (share, count) in factor.items():
        one = patient(rng, count)
        unequal[name] = Patches(one.place_N3, one.shares_NK * np.float32(share), one.features)
    scored = {name: volumes[:1] for name, volumes in cohort.scored.items()}
    rows = Rows(list(score_shares(unequal, Cohort(cohort.learnt, scored), ["knowing"], ("a", "b"), 0)))
    assert rows.mean("share_r2", SHUFFLED) < 0.02


def test_a_class_that_nobody_scored_has_has_no_row(world):
    looked_at, cohort, _ = world
    without = {
        name: Patches(one.place_N3, one.shares_NK * (1, 0 if name in ("v4", "v5", "v6", "v7") else 1), one.features)
        for name, one in looked_at.items()
    }
    rows = list(score_shares(without, cohort, ["knowing"], ("a", "b"), 0))
    assert {row.organ for row in rows} == {"a"}
