"""Which organs are in a crop? Logistic regression on the pooled tokens of a frozen encoder.

A class is present in a crop that holds more than 100 voxels of it (the protocol of NEMESIS on BTCV). Scored is the
AUROC over the crops of each patient by itself. Shapes: N crops, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from maesil.data.crops import grid_origins, read_crop
from maesil.downstream.labels import UNLABELLED, Labels
from maesil.downstream.ridge import auroc
from maesil.downstream.scored import SHUFFLED, Row
from maesil.downstream.tasks import LEAST_BODY
from maesil.models.encoders import Backbone
from maesil.progress import progress
from maesil.store.grid import box_at
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume

PRESENT_ABOVE = 100
"""Voxels of a class in a crop."""
SHUFFLES = 20
"""Orders of the labels that the control is the mean over: one order alone may score well by luck."""
_LEAST_LABELLED = 0.5
"""Share of a crop's voxels within its volume that must be labelled."""


@dataclass(frozen=True)
class Crops:
    """Crops of several volumes: whose they are, what they hold, and what each encoder makes of them."""

    volume_N: NDArray[np.str_]
    patient_N: NDArray[np.str_]
    present_NK: NDArray[np.bool_]
    pooled: dict[str, NDArray[np.float32]]
    """By encoder: mean and deviation of each channel over the tokens, ``[N, 2 D]``."""

    def of(self, patients: Sequence[str]) -> Crops:
        """Return the crops of some patients."""
        chosen = np.isin(self.patient_N, list(patients))
        pooled = {name: values[chosen] for name, values in self.pooled.items()}
        return Crops(self.volume_N[chosen], self.patient_N[chosen], self.present_NK[chosen], pooled)


@torch.no_grad()
def look_at_crops(
    reader: SuperpatchReader, labels: Labels, encoders: Mapping[str, Backbone], patient_of: Mapping[str, str]
) -> Crops:
    """Encode the grid of crops of all labelled volumes: those with enough body and labels."""
    first = next(iter(encoders.values()))
    device = next(first.parameters()).device
    volumes, present = [], []
    pooled: dict[str, list[NDArray[np.float32]]] = {name: [] for name in (*encoders, "voxels")}
    with progress({"presence": "volume"}) as report:
        for number, volume in enumerate(labels.volumes):
            for hu, counts_K in _crops(reader, labels, volume, first):
                hu_1ZYX = hu[None].to(device)
                for name, encoder in encoders.items():
                    pooled[name].append(pool(encoder.forward_features(hu_1ZYX)[0]))
                pooled["voxels"].append(pool(first.patches(hu_1ZYX)[0]))
                volumes.append(volume.volume_id)
                present.append(counts_K > PRESENT_ABOVE)
            report("presence", number + 1, len(labels.volumes))
    present_NK = np.array(present, np.bool_).reshape(len(volumes), len(labels.classes))
    features = {name: np.array(values, np.float32) for name, values in pooled.items()}
    return Crops(np.array(volumes, np.str_), np.array([patient_of[v] for v in volumes], np.str_), present_NK, features)


def pool(tokens_LD: Tensor) -> NDArray[np.float32]:
    """Return the mean and the deviation of each channel over the tokens: ``[2 D]``."""
    tokens = tokens_LD.float()
    return torch.cat([tokens.mean(dim=0), tokens.std(dim=0, correction=0)]).cpu().numpy()


def _crops(
    reader: SuperpatchReader, labels: Labels, volume: Volume, encoder: Backbone
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield int16 HU ``[Z, Y, X]`` and the voxels of each class, of every crop that is looked at."""
    truth, classes = labels.of(volume), len(labels.classes)
    for origin in grid_origins(volume, encoder.config.crop):
        within = truth[box_at(origin, encoder.config.crop)]
        counts = np.bincount(within.ravel(), minlength=UNLABELLED + 1)
        if counts[UNLABELLED] > (1 - _LEAST_LABELLED) * within.size:
            continue
        crop = read_crop(reader, volume.volume_id, origin, encoder.config.crop)
        if crop.body.mean() >= 255 * LEAST_BODY:
            yield torch.from_numpy(crop.hu), counts[1 : classes + 1]


def score_presence(
    crops: Crops, classes: Sequence[str], learnt: Sequence[str], scored: Sequence[str], first: str, seed: int
) -> Iterator[Row]:
    """Yield the AUROC of every encoder, class and scored patient, and of the first encoder with shuffled labels.

    A class without positives or negatives among the crops learnt from cannot be learnt, and has no row; nor has a
    patient whose crops all hold the class, or none of them.
    """
    train, test = crops.of(learnt), crops.of(scored)
    rng = np.random.default_rng(seed)
    for k, name in enumerate(classes):
        truth = train.present_NK[:, k]
        if not truth.any() or truth.all():
            continue
        for encoder in crops.pooled:
            yield from _rows(encoder, name, test, k, _scores(train.pooled[encoder], truth, test.pooled[encoder]))
            if encoder == first:
                orders = [rng.permutation(truth) for _ in range(SHUFFLES)]
                told = [_scores(train.pooled[first], order, test.pooled[first]) for order in orders]
                yield from _mean_rows([list(_rows(SHUFFLED, name, test, k, one)) for one in told])


def _scores(
    learnt_ND: NDArray[np.float32], truth_N: NDArray[np.bool_], asked_ND: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Fit on features brought to mean 0 and variance 1, and return what the model says of others."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(learnt_ND.astype(np.float64), truth_N)
    found: NDArray[np.float64] = model.decision_function(asked_ND.astype(np.float64))
    return found


def _rows(encoder: str, organ: str, test: Crops, k: int, scores_N: NDArray[np.float64]) -> Iterator[Row]:
    for patient in np.unique(test.patient_N):
        of_patient = test.patient_N == patient
        area = auroc(test.present_NK[of_patient, k], scores_N[of_patient])
        if area is not None:
            yield Row("presence_auroc", encoder, str(patient), area, organ)


def _mean_rows(orders: Sequence[Sequence[Row]]) -> Iterator[Row]:
    """Yield the mean over orders of the labels, row by row: each has rows of the same patients."""
    for same in zip(*orders, strict=True):
        first = same[0]
        yield Row(first.score, first.encoder, first.patient, float(np.mean([one.value for one in same])), first.organ)
