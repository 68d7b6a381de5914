"""What does the most similar crop hold, and whose scan is the most similar one? Nothing is learnt here.

Similar is what has the highest cosine of the pooled features, brought to mean 0 and variance 1 over what is searched.
Shapes: N crops that are searched, M that are asked about, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from maesil.downstream.presence import SHUFFLES, Crops
from maesil.downstream.scored import SHUFFLED, Row

Features = NDArray[np.float32]


def score_retrieval(crops: Crops, learnt: Sequence[str], scored: Sequence[str], first: str, seed: int) -> Iterator[Row]:
    """Yield, for every encoder and scored patient, how far the organs of a crop are those of the most similar crop.

    Asked about are the scored patients' crops that hold an organ; searched are those of the patients learnt from.
    The score of a crop is the organs that both hold over those that either holds (Jaccard). With shuffled labels the
    first encoder's crops take the organs of any others: what chance finds.
    """
    train, test = crops.of(learnt), crops.of(scored)
    asked: NDArray[np.bool_] = np.asarray(test.present_NK.any(axis=1))
    if not asked.any() or not len(train.present_NK):
        return
    rng = np.random.default_rng(seed)
    for encoder in crops.pooled:
        best_M = nearest(train.pooled[encoder], test.pooled[encoder][asked])
        yield from _rows(encoder, test, asked, overlap(test.present_NK[asked], train.present_NK[best_M]))
        if encoder == first:
            orders = [rng.permutation(train.present_NK)[best_M] for _ in range(SHUFFLES)]
            chance = np.mean([overlap(test.present_NK[asked], order) for order in orders], axis=0)
            yield from _rows(SHUFFLED, test, asked, chance)


def score_other_scan(crops: Crops, scored: Sequence[str]) -> Iterator[Row]:
    """Yield, for every encoder, how often the scan most similar to a patient's is another one of the same patient.

    A scan is the mean of its crops. Searched are all other labelled scans; only patients with two are asked about.
    """
    volumes = list(dict.fromkeys(crops.volume_N.tolist()))
    patient_of = dict(zip(crops.volume_N.tolist(), crops.patient_N.tolist(), strict=True))
    patients = np.array([patient_of[volume] for volume in volumes], np.str_)
    for encoder, pooled in crops.pooled.items():
        scans = np.stack([pooled[crops.volume_N == volume].mean(axis=0) for volume in volumes]) if volumes else pooled
        for patient in scored:
            own = np.flatnonzero(patients == patient)
            if len(own) > 1:
                hits = [patients[_nearest_other(scans, one)] == patient for one in own.tolist()]
                yield Row("other_scan", encoder, patient, float(np.mean(hits)))


def nearest(searched_ND: Features, asked_MD: Features) -> NDArray[np.intp]:
    """Return for each asked one the number of the most similar one."""
    mean, deviation = searched_ND.mean(axis=0), searched_ND.std(axis=0) + 1e-6
    one, other = ((some - mean) / deviation for some in (asked_MD, searched_ND))
    cosines = _unit(one) @ _unit(other).T
    found: NDArray[np.intp] = cosines.argmax(axis=1)
    return found


def overlap(one_MK: NDArray[np.bool_], other_MK: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the classes that both hold over those that either holds; 0 where neither holds any."""
    both, either = (one_MK & other_MK).sum(axis=1), (one_MK | other_MK).sum(axis=1)
    share: NDArray[np.float64] = both / np.maximum(either, 1)
    return share


def _nearest_other(scans: Features, one: int) -> int:
    others = np.delete(np.arange(len(scans)), one)
    return int(others[nearest(scans[others], scans[one : one + 1])[0]])


def _rows(encoder: str, test: Crops, asked: NDArray[np.bool_], values_M: NDArray[np.float64]) -> Iterator[Row]:
    patient_M = test.patient_N[asked]
    for patient in np.unique(patient_M):
        yield Row("retrieval", encoder, str(patient), float(values_M[patient_M == patient].mean()))


def _unit(vectors: Features) -> Features:
    unit: Features = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit
