"""What a model is given: crops, what of them is hidden, and how their HU become numbers.

One object, so that the visible patches and the targets of the loss are always cut from the same voxels, with the same
mirroring and the same window. Shapes: B samples, Z Y X voxels, V voxels of a patch, L tokens, N visible, M hidden,
S predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from maesil import kernels
from maesil.models.masking import Masks
from maesil.types import Edges, Intensity


@dataclass(frozen=True)
class CropsInScans:
    """Crops that are cut from larger scans by the very operation that needs their voxels."""

    scans_BZYX: Tensor
    """int16 HU, not mirrored."""
    origin_B3: Tensor
    """int64: first voxel (z, y, x) of each crop."""
    size: Edges
    """Edges of a crop (voxels)."""


@dataclass(frozen=True)
class MaskedInput:
    """A batch of crops and the masks over them."""

    crops: Tensor | CropsInScans
    """int16 HU ``[B, Z, Y, X]``, not mirrored yet; or the scans they lie in."""
    masks: Masks
    """Over the tokens of the mirrored crops."""
    intensity: Intensity
    patch: Edges
    """Edges of a patch (voxels)."""
    flip_B3: Tensor | None = None
    """bool: which axes z, y, x are mirrored."""
    window_B2: Tensor | None = None
    """One window (lo, hi) in HU a sample, in place of the intensity's."""
    ids_target: Tensor | None = None
    """``[B, S]``: the tokens to predict, if not all of ``masks.ids_masked``."""
    noise: Tensor | None = None
    """Standard normal numbers ``[B, ...]`` for a model whose training draws some, see `ReconstructionModel`."""
    pictured: slice | None = field(default_factory=lambda: slice(None))
    """Of which crops a model with a picture head draws pictures; None: of none."""

    def of(self, crops: slice) -> MaskedInput:
        """Return some of the crops."""
        batched = {one.name: getattr(self, one.name) for one in fields(self)}
        cut: dict[str, Any] = {name: value[crops] for name, value in batched.items() if isinstance(value, Tensor)}
        if isinstance(self.crops, CropsInScans):
            scans, origin, size = self.crops.scans_BZYX, self.crops.origin_B3, self.crops.size
            cut["crops"] = CropsInScans(scans[crops], origin[crops], size)
        return replace(self, masks=self.masks.of(crops), **cut)

    @property
    def samples(self) -> int:
        """How many crops there are."""
        return len(self._voxels)

    @property
    def device(self) -> torch.device:
        """Where the voxels lie."""
        return self._voxels.device

    @property
    def targets(self) -> Tensor:
        """The tokens that are predicted and scored, ``[B, S]``."""
        return self.masks.ids_masked if self.ids_target is None else self.ids_target

    def patches(self, ids_BN: Tensor, dtype: torch.dtype) -> Tensor:
        """Cut patches, windowed and normalised: ``[B, N, V]``."""
        return kernels.gather_patches(
            self._voxels, ids_BN, patch_size=self.patch, window=self._window, mean=self.intensity.mean,
            std=self.intensity.std, dtype=dtype, flip=self.flip_B3, **self._places,
        )  # fmt: skip

    def visible_patches(self, dtype: torch.dtype) -> Tensor:
        """Cut the visible patches: ``[B, N, V]``."""
        return self.patches(self.masks.ids_keep, dtype)

    def loss(self, pred_BSV: Tensor, weight_BS: Tensor | None = None) -> Tensor:
        """Compare predictions of ``targets`` with the truth: a float32 scalar, each patch counting by its weight."""
        return kernels.masked_reconstruction_loss(
            pred_BSV, self._voxels, self.targets, patch_size=self.patch, window=self._window,
            mean=self.intensity.mean, std=self.intensity.std, weight=weight_BS, flip=self.flip_B3, **self._places,
        )  # fmt: skip

    def input_dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype that activations have: autocast's, or else that of the weights."""
        device = self.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    @property
    def _voxels(self) -> Tensor:
        return self.crops if isinstance(self.crops, Tensor) else self.crops.scans_BZYX

    @property
    def _places(self) -> dict[str, Any]:
        """What the kernels must know to cut crops from scans."""
        if isinstance(self.crops, Tensor):
            return {}
        return {"origin": self.crops.origin_B3, "size": self.crops.size}

    @property
    def _window(self) -> tuple[float, float] | Tensor:
        return self.intensity.window if self.window_B2 is None else self.window_B2
