"""What of a score comes through the encoder: the same volume again, with other latent tokens in place of its own.

A head that sees the true voxels beside a gap can fill the gap by itself, and an encoder that nobody needs learns
nothing. The score alone does not show that; these passes do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from maesil.evaluation.metrics import ErrorSums, Region
from maesil.evaluation.predict import ModelPredictor, Reconstruction, reconstruct
from maesil.evaluation.scores import Psnr, Row, ScoreName
from maesil.models.latent import USED_FROM_DB, LatentChange, LatentStatistics, mean_over_crop, shuffled
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.training.checkpoint import Run


def primary_score(run: Run) -> Psnr:
    """Return the name of the score that stands for a run: of the hidden voxels, or of all where none is hidden."""
    return "psnr_whole" if run.config.mask.kind == "none" else "psnr_hidden"


@dataclass(frozen=True)
class EncoderUse:
    """What an encoder is worth in one region of a volume."""

    gain_db: float
    """What the score loses when each latent token is replaced by the mean over its crop."""
    gain_shuffled_db: float
    """What it loses when the tokens of a crop change places."""
    effective_rank: float
    """That of the volume's latent tokens (`LatentStatistics`), the same for all regions."""


def encoder_use(
    run: Run,
    reader: SuperpatchReader,
    volume: Volume,
    predictor: ModelPredictor,
    unchanged: Reconstruction,
    reference: Tensor,
    regions: dict[Region, Tensor],
    seed: int,
) -> dict[Region, EncoderUse]:
    """Return what the encoder is worth for a volume, by region; ``unchanged`` is what the model predicts as it is."""
    name, statistics = primary_score(run), LatentStatistics()

    def score_with(change: LatentChange) -> dict[Region, float]:
        with predictor.model.latent_changed(change):
            result = reconstruct(reader, volume, predictor, run.config, seed, reference.device)
        return {region: _score(run, reference, result, voxels, name) for region, voxels in regions.items()}

    by_mean = score_with(lambda latent_BND: mean_over_crop(statistics(latent_BND)))
    by_order = score_with(shuffled)
    as_it_is = {region: _score(run, reference, unchanged, voxels, name) for region, voxels in regions.items()}
    return {
        region: EncoderUse(score - by_mean[region], score - by_order[region], statistics.effective_rank)
        for region, score in as_it_is.items()
    }


def _score(run: Run, reference: Tensor, result: Reconstruction, voxels: Tensor, name: Psnr) -> float:
    sums = ErrorSums(run.intensity.window)
    sums.add(reference, result.predicted, result.hidden, voxels)
    score: float = getattr(sums, name)
    return score


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
