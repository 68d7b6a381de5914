"""Whatever fills in hidden patches, and a whole volume filled in by it, crop by crop.

Shapes: B samples, Z Y X voxels of a crop or of a volume; the tensors of a volume are not batched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from maesil.config.schema import RunConfig
from maesil.data.crops import Crop, grid_crops, whole_patches
from maesil.evaluation.naive import InterpolationBaseline, MeanBaseline
from maesil.models.masked_autoencoder import ReconstructionModel
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import Masks, make_masks
from maesil.models.patches import expand_cells, patchify, to_hu, unpatchify
from maesil.store.grid import box_at
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.training.checkpoint import Run
from maesil.types import AIR_HU, MAP_CELL, Edges, Intensity, Zyx, zyx


class Predictor(Protocol):
    """Whatever fills in hidden patches; all of them are given the same crops and the same masks."""

    name: str

    def predict_hu(self, volume_BZYX: Tensor, masks: Masks, valid_BZYX: Tensor | None = None) -> Tensor:
        """Predict every voxel of int16 HU crops: float32 HU ``[B, Z, Y, X]``; ``valid_BZYX`` bool, inside the scan."""


class ModelPredictor:
    """A trained model as it puts voxels out: hidden patches, and visible ones no loss ever taught it.

    ``pictured``: as its picture head draws them, if it has one; else what the tokens alone say (``maesil_tokens``).
    """

    def __init__(self, model: ReconstructionModel, intensity: Intensity, *, pictured: bool = True) -> None:
        self.name = model.config.kind if pictured else f"{model.config.kind}_tokens"
        self.model, self.intensity, self.pictured = model.eval(), intensity, pictured

    @torch.no_grad()
    def predict_hu(self, volume_BZYX: Tensor, masks: Masks, valid_BZYX: Tensor | None = None) -> Tensor:
        """Predict every voxel, float32 HU ``[B, Z, Y, X]`` clipped to the window."""
        config = self.model.config
        inputs = MaskedInput(volume_BZYX, masks, self.intensity, config.patch)
        tokens_BLV = self.model.predict_all(inputs, pictured=self.pictured)
        return unpatchify(to_hu(tokens_BLV.float(), self.intensity), config.grid, config.patch)


@dataclass(frozen=True)
class Reconstruction:
    """A volume predicted crop by crop. All ``[Z, Y, X]``."""

    predicted: Tensor
    """Float32 HU; -1024 where there was nothing to predict from (no valid voxel in the crop)."""
    hidden: Tensor
    """Bool: hidden from the predictor."""
    column_hidden: Tensor
    """Bool: hidden, and all of its column in the crop as well."""


def make_predictors(run: Run) -> tuple[Predictor, ...]:
    """Return what the model predicts and the naive baselines, which were trained on nothing.

    Where nothing is hidden there is nothing to fill in, and no baseline.
    """
    models = model_predictors(run)
    return models if run.config.mask.kind == "none" else (*models, *naive_baselines(run))


def model_predictors(run: Run) -> tuple[ModelPredictor, ...]:
    """Return the model as people see it, and what its tokens alone say where a picture head draws what they see."""
    shown = ModelPredictor(run.model, run.intensity)
    if run.model.trained_beside is None:
        return (shown,)
    return shown, ModelPredictor(run.model, run.intensity, pictured=False)


def naive_baselines(run: Run) -> tuple[Predictor, ...]:
    """Return the two naive baselines for the window and the patches of a run."""
    window, patch = run.intensity.window, run.config.model.patch
    return MeanBaseline(window, patch), InterpolationBaseline(window, patch)


def mask_seed(seed: int, volume_id: str, origin: Zyx) -> int:
    """Return the seed of one crop's mask: SHA-256 of (seed, volume, origin), the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{volume_id}:{origin[0]}:{origin[1]}:{origin[2]}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def reconstruct(
    reader: SuperpatchReader, volume: Volume, predictor: Predictor, config: RunConfig, seed: int, device: torch.device
) -> Reconstruction:
    """Predict a volume over its aligned grid of crops, each masked by its own seed (`mask_seed`)."""
    crop, grid = config.model.crop_zyx, config.model.grid
    padded = [-(-n // edge) * edge for n, edge in zip(volume.shape, crop, strict=True)]
    predicted = torch.full(padded, float(AIR_HU), device=device)
    hidden, column_hidden = (torch.zeros(padded, dtype=torch.bool, device=device) for _ in range(2))
    for crops in _batches(grid_crops(reader, [volume.volume_id], crop), crops_at_once(crop, device)):
        hu = torch.from_numpy(np.stack([one.hu for one in crops])).to(device)
        valid = torch.from_numpy(np.stack([one.valid for one in crops])).to(device) == 255
        masks = make_masks(config.mask, grid, [mask_seed(seed, volume.volume_id, one.origin) for one in crops], device)
        values = predictor.predict_hu(hu, masks, expand_cells(valid, MAP_CELL))
        tokens = (masks.mask > 0).view(-1, *grid)
        columns = tokens.all(dim=1, keepdim=True).expand_as(tokens)
        parts = (values, expand_cells(tokens, config.model.patch), expand_cells(columns, config.model.patch))
        for sample, one in enumerate(crops):
            box = box_at(one.origin, crop)
            for canvas, part in zip((predicted, hidden, column_hidden), parts, strict=True):
                canvas[box] = part[sample]
    inside = tuple(slice(0, n) for n in volume.shape)
    return Reconstruction(predicted[inside], hidden[inside], column_hidden[inside])


def psnr_of_crops(predictor: Predictor, crops: Sequence[Crop], run: Run) -> float:
    """Return the PSNR (dB) of a predictor on the crops that a run validates on, as its ``validation_psnr`` is taken.

    The masks are those of the validation: seeds 0, 1, 2 ... in the order of the crops.
    """
    model, sums = run.config.model, torch.zeros(2, dtype=torch.float64)
    for number, crop in enumerate(crops):
        hu_BZYX, masks = torch.from_numpy(crop.hu)[None], make_masks(run.config.mask, model.grid, [number])
        whole_BL = whole_patches(torch.from_numpy(crop.valid)[None], model.patch)
        inside = expand_cells(torch.from_numpy(crop.valid)[None] == 255, MAP_CELL)
        error = predictor.predict_hu(hu_BZYX, masks, inside) - hu_BZYX.float().clamp(*run.intensity.window)
        weight_BL = whole_BL * masks.mask
        sums[0] += (patchify(error, model.patch).square().mean(dim=-1) * weight_BL).sum(dtype=torch.float64)
        sums[1] += weight_BL.sum(dtype=torch.float64)
    lo, hi = run.intensity.window
    return float(10 * torch.log10((hi - lo) ** 2 * sums[1] / sums[0]))


def _batches(crops: Iterator[Crop], size: int) -> Iterator[list[Crop]]:
    while batch := list(islice(crops, size)):
        yield batch


def crops_at_once(crop: Edges, device: torch.device) -> int:
    """Return how many crops to predict at once: about 2 million voxels on a CPU, 32 million on a GPU."""
    return max(1, (2**25 if device.type == "cuda" else 2**21) // math.prod(zyx(crop)))
