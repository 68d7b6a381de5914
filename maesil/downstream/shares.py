"""The linear probe of `maesil.downstream.probe` on patients kept apart, scored patient by patient.

Shapes: N patches, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from maesil.downstream.cohort import Cohort
from maesil.downstream.probe import Patches, join
from maesil.downstream.ridge import Array, Moments, fit
from maesil.downstream.scored import SHUFFLED, Row
from maesil.store.records import Volume


def score_shares(
    looked_at: Mapping[str, Patches], cohort: Cohort, encoders: Sequence[str], classes: Sequence[str], seed: int
) -> Iterator[Row]:
    """Yield R2 of the share of each class for every encoder and scored patient, and with shuffled labels.

    The error of a patient is measured by the variance over all scored patients, each of the same weight: a patient with
    hardly any of a class has no variance to speak of. So the mean over patients is R2 with patches weighted alike, and
    no constant scores above 0 there. A class that never varies has no row.
    """
    train, test = (
        {name: patches for name, of in some.items() if (patches := _joined(looked_at, of)) is not None}
        for some in (_ids(cohort.learnt), _ids(cohort.scored))
    )
    if not train or not test:
        return
    variance_K = _variance([one.shares_NK.astype(np.float64) for one in test.values()])
    rng = np.random.default_rng(seed)
    shuffled = {name: rng.permutation(one.shares_NK) for name, one in train.items()}
    for encoder, taught_as in ((encoders[0], SHUFFLED), *((name, name) for name in encoders)):
        truths = [shuffled[name] if taught_as == SHUFFLED else one.shares_NK for name, one in train.items()]
        features = [one.features[encoder] for one in train.values()]
        model = fit([Moments.of(x, y) for x, y in zip(features, truths, strict=True)])
        for patient, one in test.items():
            error_K = np.square(model(one.features[encoder]) - one.shares_NK).mean(axis=0)
            for k, name in enumerate(classes):
                if variance_K[k] > 0:
                    yield Row("share_r2", taught_as, patient, _r2(error_K[k], variance_K[k]), name)


def _variance(patients: Sequence[Array]) -> Array:
    """Return the variance of each class over the patches of all patients, every patient of the same weight."""
    mean_K = np.mean([one.mean(axis=0) for one in patients], axis=0)
    variance_K: Array = np.mean([np.square(one - mean_K).mean(axis=0) for one in patients], axis=0)
    return variance_K


def _r2(error: float, variance: float) -> float:
    return float(1 - error / variance)


def _ids(patients: Mapping[str, Sequence[Volume]]) -> dict[str, list[str]]:
    return {name: [volume.volume_id for volume in volumes] for name, volumes in patients.items()}


def _joined(looked_at: Mapping[str, Patches], volume_ids: Sequence[str]) -> Patches | None:
    """Return the patches of a patient, None where there are none."""
    parts = [looked_at[volume_id] for volume_id in volume_ids]
    return join(parts) if sum(len(one.shares_NK) for one in parts) else None
