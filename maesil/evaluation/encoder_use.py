"""What of a score comes through the encoder: the same volume again, with other latent tokens in place of its own.

A head that sees the true voxels beside a gap can fill the gap by itself, and an encoder that nobody needs learns
nothing. The score alone does not show that; these passes do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maesil.data.crops import Crop
from maesil.evaluation.metrics import Region, codes_of, psnr, with_bit
from maesil.evaluation.predict import Batch, ModelPass, ModelPredictor
from maesil.evaluation.scores import Row, ScoreName
from maesil.models.latent import USED_FROM_DB, LatentChange, LatentStatistics, mean_over_crop, shuffled
from maesil.models.patches import patchify, to_hu, tokens_at
from maesil.store.grid import box_at
from maesil.types import Window


@dataclass(frozen=True)
class EncoderUse:
    """What an encoder is worth in one region of a volume."""

    gain_db: float
    """What the score loses when each latent token is replaced by the mean over its crop."""
    gain_shuffled_db: float
    """What it loses when the tokens of a crop change places."""
    effective_rank: float
    """That of the volume's latent tokens (`LatentStatistics`), the same for all regions."""


class EncoderTrial:
    """Pools, batch by batch, the errors of a volume as it is and with other latent tokens."""

    def __init__(self, window: Window, predictors: Sequence[ModelPredictor], regions: Mapping[Region, Tensor]) -> None:
        self._window, self._predictors, self._regions = window, predictors, list(regions)
        self._statistics = LatentStatistics()
        self._codes_ZYX = codes_of(list(regions.values()))
        shape = (1 + len(_CHANGES), 2, 2 ** len(regions))  # voxels and squared errors of each combination of regions
        self._sums = {one.name: torch.zeros(shape, dtype=torch.float64) for one in predictors}

    @torch.no_grad()
    def watch(self, batch: Batch, passes: Sequence[ModelPass]) -> None:
        """Decode a batch once more for each change, and add its errors (`Watch`)."""
        (through,) = passes
        inputs, latent_BND, patch = through.inputs, through.encoded.tokens_BND, through.inputs.patch
        ids_BS = inputs.targets
        codes_BZYX = torch.stack([self._codes_of(crop) for crop in batch.crops])
        codes_BSV = tokens_at(patchify(codes_BZYX, patch), ids_BS).flatten()
        truth_BSV = to_hu(inputs.patches(ids_BS, torch.float32), inputs.intensity)
        self._statistics(latent_BND)
        for one in self._predictors:
            self._add(one, 0, codes_BSV, tokens_at(one.patches_hu(through.everything), ids_BS) - truth_BSV)
        for number, change in enumerate(_CHANGES, start=1):
            prediction = through.hidden(change(latent_BND))
            for one in self._predictors:
                self._add(one, number, codes_BSV, one.patches_hu(prediction) - truth_BSV)

    def _add(self, predictor: ModelPredictor, number: int, codes: Tensor, error_BSV: Tensor) -> None:
        sums = self._sums[predictor.name][number]
        for total, weights in zip(sums, (None, error_BSV.flatten().square_().double()), strict=True):
            total += torch.bincount(codes, weights, minlength=len(total)).cpu()

    def _codes_of(self, crop: Crop) -> Tensor:
        """Return in which regions the voxels of a crop are, uint8 ``[Z, Y, X]``; beyond the volume in none."""
        inside = self._codes_ZYX[box_at(crop.origin, crop.hu.shape)]
        codes = inside.new_zeros(crop.hu.shape)
        z, y, x = inside.shape
        codes[:z, :y, :x] = inside
        return codes

    def result(self, name: str) -> dict[Region, EncoderUse]:
        """Return what the encoder is worth by region, as one of the predictors shows it."""
        found = {}
        for bit, region in enumerate(self._regions):
            voxels, squared = self._sums[name][..., with_bit(bit, 2 ** len(self._regions))].sum(dim=-1).T.tolist()
            as_it_is, by_mean, by_order = (
                psnr(error, int(count), self._window) for count, error in zip(voxels, squared, strict=True)
            )
            found[region] = EncoderUse(as_it_is - by_mean, as_it_is - by_order, self._statistics.effective_rank)
        return found


_CHANGES: tuple[LatentChange, ...] = (mean_over_crop, shuffled)


def warning_of_unused_encoders(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return a sentence for each masked model whose encoder is not used; ``rows`` are those of a report."""
    return tuple(
        f"Warning: the encoder of {row['model']} is not used. The score falls by {row['encoder_gain_db']:.2f} dB when "
        f"its tokens are replaced by their mean, by {row['encoder_gain_shuffled_db']:.2f} dB when they are shuffled: "
        "the decoder or the head fills the gaps without it, and the encoder has not learnt from them."
        for row in rows
        if row["table"] == "A" and row["region"] == "body" and _unused(row)
    )


def _unused(row: Row) -> bool:
    gains = [gain for name in _GAINS if (gain := row[name]) is not None]
    return len(gains) == len(_GAINS) and min(gains) < USED_FROM_DB


_GAINS: tuple[ScoreName, ...] = ("encoder_gain_db", "encoder_gain_shuffled_db")
