"""Whatever fills in hidden patches, and a whole volume filled in by it, crop by crop.

Shapes: B samples, Z Y X voxels of a crop or of a volume; the tensors of a volume are not batched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from maesil.config.schema import RunConfig
from maesil.data.crops import Crop, grid_crops, whole_patches
from maesil.evaluation.naive import InterpolationBaseline, MeanBaseline
from maesil.models.masked_autoencoder import Prediction, ReconstructionModel
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

    def predict_hu(self, volume_BZYX: Tensor, masks: Masks, valid_BZYX: Tensor | None = None) -> Tensor:
        """Predict every voxel, float32 HU ``[B, Z, Y, X]`` clipped to the window."""
        return self.voxels(ModelPass(self.model, self.intensity, volume_BZYX, masks).everything)

    def voxels(self, everything: Prediction) -> Tensor:
        """Return what the model predicts of every patch as float32 HU ``[B, Z, Y, X]`` clipped to the window."""
        config = self.model.config
        return unpatchify(self.patches_hu(everything), config.grid, config.patch)

    def patches_hu(self, prediction: Prediction) -> Tensor:
        """Return predicted patches as float32 HU clipped to the window, ``[B, S, V]``."""
        patches_BSV = prediction.shown if self.pictured else prediction.patches_BSV
        return to_hu(patches_BSV.float(), self.intensity)


class ModelPass:
    """A batch of crops in a model: encoded once, and decoded as often as it is asked for."""

    @torch.no_grad()
    def __init__(self, model: ReconstructionModel, intensity: Intensity, volume_BZYX: Tensor, masks: Masks) -> None:
        self.model, self.inputs = model, MaskedInput(volume_BZYX, masks, intensity, model.config.patch)
        self.encoded = model.encode(self.inputs)

    @cached_property
    @torch.no_grad()
    def everything(self) -> Prediction:
        """What the model makes of every patch, visible ones too."""
        return self.model.decode(self.encoded, replace(self.inputs, ids_target=self.model.all_tokens(self.inputs)))

    @torch.no_grad()
    def hidden(self, tokens_BND: Tensor) -> Prediction:
        """What the model makes of the patches that are to be predicted, were these its latent tokens."""
        return self.model.decode(replace(self.encoded, tokens_BND=tokens_BND), self.inputs)


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
    (made,) = reconstruct_by(reader, volume, [predictor], config, seed, device)
    return made


@dataclass(frozen=True)
class Batch:
    """Some crops of a volume, and what is hidden of them."""

    crops: list[Crop]
    hu_BZYX: Tensor
    valid_BZYX: Tensor
    """Bool: inside the scan."""
    masks: Masks


Watch = Callable[[Batch, "list[ModelPass]"], None]
"""Is shown every batch once it is predicted, and how it went through the models."""


def reconstruct_by(
    reader: SuperpatchReader,
    volume: Volume,
    predictors: Sequence[Predictor],
    config: RunConfig,
    seed: int,
    device: torch.device,
    watch: Watch | None = None,
) -> list[Reconstruction]:
    """Predict a volume as `reconstruct` does, by several predictors at once; those of one model share its passes."""
    crop, grid = config.model.crop_zyx, config.model.grid
    padded = [-(-n // edge) * edge for n, edge in zip(volume.shape, crop, strict=True)]
    hidden, column_hidden = (torch.zeros(padded, dtype=torch.bool, device=device) for _ in range(2))
    canvases = [torch.full(padded, float(AIR_HU), device=device) for _ in predictors]
    for batch in _batches(reader, volume, config, seed, device):
        tokens = (batch.masks.mask > 0).view(-1, *grid)
        columns = tokens.all(dim=1, keepdim=True).expand_as(tokens)
        passes, voxels = _predict(predictors, batch)
        parts = [*voxels, *(expand_cells(one, config.model.patch) for one in (tokens, columns))]
        for sample, one in enumerate(batch.crops):
            box = box_at(one.origin, crop)
            for canvas, part in zip((*canvases, hidden, column_hidden), parts, strict=True):
                canvas[box] = part[sample]
        if watch:
            watch(batch, passes)
    inside = tuple(slice(0, n) for n in volume.shape)
    return [Reconstruction(canvas[inside], hidden[inside], column_hidden[inside]) for canvas in canvases]


def _predict(predictors: Sequence[Predictor], batch: Batch) -> tuple[list[ModelPass], list[Tensor]]:
    """Return the passes, one for each model, and the voxels by each predictor, float32 HU ``[B, Z, Y, X]``."""
    passes: dict[ReconstructionModel, ModelPass] = {}
    voxels = []
    for predictor in predictors:
        if isinstance(predictor, ModelPredictor):
            model = predictor.model
            if model not in passes:
                passes[model] = ModelPass(model, predictor.intensity, batch.hu_BZYX, batch.masks)
            voxels.append(predictor.voxels(passes[model].everything))
        else:
            voxels.append(predictor.predict_hu(batch.hu_BZYX, batch.masks, batch.valid_BZYX))
    return list(passes.values()), voxels


def _batches(
    reader: SuperpatchReader, volume: Volume, config: RunConfig, seed: int, device: torch.device
) -> Iterator[Batch]:
    """Read the crops of a volume that hold any valid voxel, and mask each by its own seed."""
    model, crops = config.model, grid_crops(reader, [volume.volume_id], config.model.crop)
    while some := list(islice(crops, crops_at_once(model.crop, device))):
        hu_BZYX = torch.from_numpy(np.stack([one.hu for one in some])).to(device)
        inside = torch.from_numpy(np.stack([one.valid for one in some])).to(device) == 255
        seeds = [mask_seed(seed, volume.volume_id, one.origin) for one in some]
        yield Batch(some, hu_BZYX, expand_cells(inside, MAP_CELL), make_masks(config.mask, model.grid, seeds, device))


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


def crops_at_once(crop: Edges, device: torch.device) -> int:
    """Return how many crops to predict at once: about 2 million voxels on a CPU, 32 million on a GPU."""
    return max(1, (2**25 if device.type == "cuda" else 2**21) // math.prod(zyx(crop)))
