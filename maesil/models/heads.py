"""Output heads: from decoded tokens to voxels. The plain linear one leaves the grid of patches in the picture.

MAESIL (arXiv 2604.00514) names fixed-pattern artifacts of its decoder as its limitation. The other heads avoid them,
each in its own way; `maesil.evaluation.metrics.BorderSums` measures what is left, ``docs/explanation/heads.md``
tells how much.

Shapes: B samples, L tokens of the grid (gz, gy, gx), S tokens to predict, E decoder width, V voxels of a patch,
Q of a box, C channels, Z Y X voxels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from maesil.config.schema import ModelConfig
from maesil.models.faces import Faces, Known
from maesil.models.patches import halvings, patchify, tokens_at, with_tokens_at


class Head(nn.Module, ABC):
    """Predicts the voxels ``[B, S, V]`` of tokens ``ids_BS``."""

    needs_all_tokens = False
    """Whether ``decoded`` must hold all L tokens of the grid, in order, and not the S of ``ids_BS`` alone."""

    @abstractmethod
    def forward(self, decoded: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """``decoded [B, L or S, E]`` to ``[B, S, V]``."""


class LinearHead(Head):
    """One linear map a token, as in MAE (arXiv 2111.06377): neighbouring patches know nothing of each other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pred = nn.Linear(config.decoder_width, config.patch_voxels)

    def forward(self, decoded: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """See `Head.forward`."""
        pred_BSV: Tensor = self.pred(decoded)
        return pred_BSV


class OverlapHead(Head):
    """Each token predicts a box that reaches into its neighbours on all sides; where boxes overlap they are faded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.boxes = Boxes(config)
        self.pred = nn.Linear(config.decoder_width, math.prod(self.boxes.edges))

    def forward(self, decoded: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """See `Head.forward`."""
        return self.boxes.blend(self.pred(decoded), ids_BS, known)


class InterpolateHead(Head):
    """Trilinear interpolation between tokens and small convolutions, in halving steps (after arXiv 2507.01744)."""

    needs_all_tokens = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch, self.grid = config.patch_zyx, config.grid
        self.steps = halvings(config.patch)[::-1]
        channels = [max(8, 64 >> stage) for stage in range(len(self.steps) + 1)]
        self.embed = nn.Linear(config.decoder_width, channels[0])
        self.convs = nn.ModuleList(nn.Conv3d(before, after, 3, padding=1) for before, after in pairwise(channels))
        self.pred = nn.Conv3d(channels[-1], 1, 3, padding=1)

    def forward(self, decoded: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """See `Head.forward`."""
        field_BCzyx = self.embed(decoded).transpose(1, 2).reshape(len(decoded), -1, *self.grid)
        for conv, step in zip(self.convs, self.steps, strict=True):
            field_BCzyx = functional.gelu(conv(field_BCzyx))
            size = [n * factor for n, factor in zip(field_BCzyx.shape[2:], step, strict=True)]
            field_BCzyx = functional.interpolate(field_BCzyx, size, mode="trilinear", align_corners=False)
        return tokens_at(patchify(self.pred(field_BCzyx)[:, 0], self.patch), ids_BS)


class RefineHead(Head):
    """A linear prediction, then corrections from what does not meet at the borders of a patch (ours).

    It sees the true voxels beside a gap. Trained together with an encoder, it fills the gap without it. So older runs
    alone are read with it, and `PictureHead` does its work now.
    """

    ROUNDS = 3

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = 2 * config.decoder_width
        self.faces = Faces(config)
        self.pred = nn.Linear(config.decoder_width, config.patch_voxels)
        self.mismatch = nn.Linear(self.faces.width, hidden)
        self.correction = nn.Linear(hidden, config.patch_voxels)

    def forward(self, decoded: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """See `Head.forward`."""
        pred_BSV: Tensor = self.pred(decoded)
        for _ in range(self.ROUNDS):
            seen = self.faces.seen(pred_BSV, ids_BS, known)
            pred_BSV = pred_BSV + self.correction(functional.gelu(self.mismatch(seen)))
        return self.faces.meet(pred_BSV, ids_BS, known)


class Boxes:
    """Predicted boxes, `reach` voxels larger than a patch on all sides, and how they blend into patches."""

    def __init__(self, config: ModelConfig) -> None:
        self.patch, self.grid = config.patch_zyx, config.grid
        self.reach = [max(1, edge // 8) if edge > 1 else 0 for edge in self.patch]
        self.edges = [edge + 2 * reach for edge, reach in zip(self.patch, self.reach, strict=True)]

    def blend(self, boxes_BSQ: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """Fade the boxes of tokens ``ids_BS`` into each other: their patches, ``[B, S, V]``.

        A visible token, should it be predicted as well, reaches into no other: no loss has taught it to.
        """
        visible_BL = torch.zeros(len(ids_BS), math.prod(self.grid), device=ids_BS.device)
        visible_BL = visible_BL.scatter(1, known.ids_BN, known.usable_BN.to(visible_BL.dtype))
        fade_Q, own_Q = self._fade(ids_BS.device)
        weights_BSQ = torch.where(visible_BL.gather(1, ids_BS)[..., None] > 0, fade_Q * own_Q, fade_Q)
        weights_BSQ = weights_BSQ.to(boxes_BSQ.dtype)
        return self._overlap_add(boxes_BSQ * weights_BSQ, ids_BS) / self._overlap_add(weights_BSQ, ids_BS)

    def _fade(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the weight of each voxel of a box, 1 inside and falling where boxes overlap, and which are its own.

        Both float32 ``[Q]``.
        """
        ramps, own = [], []
        for edge, reach in zip(self.edges, self.reach, strict=True):
            position = torch.arange(edge, device=device) + 0.5
            inward = torch.minimum(position, edge - position)
            ramps.append((inward / max(1, 2 * reach)).clamp(max=1.0))
            own.append((inward > reach).float())
        fade, inside = (z[:, None, None] * y[:, None] * x for z, y, x in (ramps, own))
        return fade.flatten(), inside.flatten()

    def _overlap_add(self, boxes_BSQ: Tensor, ids_BS: Tensor) -> Tensor:
        """Add up boxes where they overlap, axis by axis."""
        L = math.prod(self.grid)
        everywhere = with_tokens_at(boxes_BSQ.new_zeros(len(boxes_BSQ), L, boxes_BSQ.shape[-1]), ids_BS, boxes_BSQ)
        boxes = everywhere.transpose(1, 2).reshape(-1, *self.edges, *self.grid)
        for axis, (patch, reach) in enumerate(zip(self.patch, self.reach, strict=True)):
            voxel, token = 1 + axis, 4 + axis
            before, own, after = torch.split(boxes, [reach, patch, reach], dim=voxel)
            own, last = own.clone(), self.grid[axis] - 1
            into_next = own.narrow(token, 1, last).narrow(voxel, 0, reach)
            into_next.add_(after.narrow(token, 0, last))
            into_last = own.narrow(token, 0, last).narrow(voxel, patch - reach, reach)
            into_last.add_(before.narrow(token, 1, last))
            boxes = own
        return tokens_at(boxes.flatten(1, 3).flatten(2).transpose(1, 2), ids_BS)


_HEADS: dict[str, Callable[[ModelConfig], Head]] = {
    "linear": LinearHead,
    "overlap": OverlapHead,
    "interpolate": InterpolateHead,
    "refine": RefineHead,
}


def make_head(config: ModelConfig) -> Head:
    """Make the head that a configuration names."""
    return _HEADS[config.head](config)
