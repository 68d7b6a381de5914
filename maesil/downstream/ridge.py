"""Ridge regression from tokens to shares of classes, out of sums alone, and how well it does.

scikit-learn's `Ridge` wants all patches in memory for every fold and penalty, while sums of one patient add up to those
of any fold; so it is the oracle of the tests, and the scores alone are taken from scikit-learn.
Shapes: N patches, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import r2_score, roc_auc_score

Array = NDArray[np.float64]
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried weights of the penalty, relative to the number of patches, on features of variance 1."""
_WITHOUT_CHOICE = 1e-2


@dataclass(frozen=True)
class Moments:
    """All that ridge regression needs to know of a set of patches; sets add up."""

    count: int
    x_D: Array
    y_K: Array
    xx_DD: Array
    xy_DK: Array
    yy_K: Array

    @classmethod
    def of(cls, features_ND: NDArray[np.float32], shares_NK: NDArray[np.float32]) -> Moments:
        """Sum over patches."""
        x, y = features_ND.astype(np.float64), shares_NK.astype(np.float64)
        return cls(len(x), x.sum(axis=0), y.sum(axis=0), x.T @ x, x.T @ y, (y * y).sum(axis=0))

    def __add__(self, other: Moments) -> Moments:
        """Both sets."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Moments(*(one + another for one, another in pairs))

    def squared_error(self, model: Linear) -> float:
        """Return the squared error of a model on the set, summed over patches and classes."""
        w, b = model.weights_DK, model.bias_K
        crossed = (w * self.xy_DK).sum(axis=0) + b * self.y_K
        predicted = (w * (self.xx_DD @ w)).sum(axis=0) + 2 * b * (self.x_D @ w) + self.count * b * b
        return float((self.yy_K - 2 * crossed + predicted).sum())


@dataclass(frozen=True)
class Linear:
    """A linear map and its offset."""

    weights_DK: Array
    bias_K: Array

    def __call__(self, features_ND: NDArray[np.float32]) -> Array:
        """Predict shares ``[N, K]``."""
        predicted: Array = features_ND.astype(np.float64) @ self.weights_DK + self.bias_K
        return predicted


def sum_of(parts: Sequence[Moments]) -> Moments:
    """Add up sets of patches."""
    first, *rest = parts
    return sum(rest, start=first)


def fit(parts: Sequence[Moments]) -> Linear:
    """Fit ridge regression to several sets; the penalty is chosen by leaving out one set after another.

    Of a single set none can be left out, and the penalty is 0.01.
    """
    if len(parts) < 2:
        return ridge(parts[0], [_WITHOUT_CHOICE])[0]
    errors = np.zeros(len(PENALTIES))
    for left_out, part in enumerate(parts):
        others = sum_of([one for number, one in enumerate(parts) if number != left_out])
        errors += [part.squared_error(model) for model in ridge(others, PENALTIES)]
    return ridge(sum_of(parts), [PENALTIES[int(errors.argmin())]])[0]


def ridge(moments: Moments, penalties: Sequence[float]) -> list[Linear]:
    """Solve ridge regression for each penalty, the features brought to mean 0 and variance 1, the offset free."""
    n = moments.count
    mean_D, mean_K = moments.x_D / n, moments.y_K / n
    covariance = moments.xx_DD / n - np.outer(mean_D, mean_D)
    scale_D = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    values, vectors = np.linalg.eigh(covariance / np.outer(scale_D, scale_D))
    crossed = (moments.xy_DK / n - np.outer(mean_D, mean_K)) / scale_D[:, None]
    turned = vectors.T @ crossed
    found = []
    for penalty in penalties:
        weights = (vectors @ (turned / (np.maximum(values, 0.0) + penalty)[:, None])) / scale_D[:, None]
        found.append(Linear(weights, mean_K - mean_D @ weights))
    return found


def r_squared(truth_N: Array, predicted_N: Array) -> float | None:
    """Return the share of the variance that is explained; None where the truth is constant."""
    return float(r2_score(truth_N, predicted_N)) if np.ptp(truth_N) > 0 else None


def auroc(positive_N: NDArray[np.bool_], score_N: Array) -> float | None:
    """Return the area under the ROC curve: how often a positive scores above a negative, ties counting half.

    None without any positive or without any negative.
    """
    return float(roc_auc_score(positive_N, score_N)) if positive_N.any() and not positive_N.all() else None
