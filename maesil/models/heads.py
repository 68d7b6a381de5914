"""Output heads: from decoded tokens to voxels. The plain linear one leaves the grid of patches in the picture.

MAESIL (arXiv 2604.00514) names fixed-pattern artifacts of its decoder as its limitation. The other heads avoid them,
each in its own way; `maesil.evaluation.metrics.BorderSums` measures what is left, ``docs/explanation/heads.md``
tells how much.

Shapes: B samples, L tokens of the grid (gz, gy, gx), S tokens to predict, E decoder width, P patch edge, V = P^3,
C channels, Z Y X voxels.
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
from maesil.models.patches import patchify, tokens_at, with_tokens_at


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
        self.pred = nn.Linear(config.decoder_width, config.patch**3)

    def forward(self, decoded: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """See `Head.forward`."""
        pred_BSV: Tensor = self.pred(decoded)
        return pred_BSV


class OverlapHead(Head):
    """Each token predicts a cube that reaches into its neighbours on all sides; where cubes overlap they are faded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cubes = Cubes(config)
        self.pred = nn.Linear(config.decoder_width, self.cubes.edge**3)

    def forward(self, decoded: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """See `Head.forward`."""
        return self.cubes.blend(self.pred(decoded), ids_BS, known)


class InterpolateHead(Head):
    """Trilinear interpolation between tokens and small convolutions, in halving steps (after arXiv 2507.01744)."""

    needs_all_tokens = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch, self.grid = config.patch, config.grid
        channels = [max(8, 64 >> stage) for stage in range(config.patch.bit_length())]
        self.embed = nn.Linear(config.decoder_width, channels[0])
        self.convs = nn.ModuleList(nn.Conv3d(before, after, 3, padding=1) for before, after in pairwise(channels))
        self.pred = nn.Conv3d(channels[-1], 1, 3, padding=1)

    def forward(self, decoded: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """See `Head.forward`."""
        field_BCzyx = self.embed(decoded).transpose(1, 2).reshape(len(decoded), -1, *self.grid)
        for conv in self.convs:
            field_BCzyx = functional.gelu(conv(field_BCzyx))
            field_BCzyx = functional.interpolate(field_BCzyx, scale_factor=2, mode="trilinear", align_corners=False)
        return tokens_at(patchify(self.pred(field_BCzyx)[:, 0], self.patch), ids_BS)


class RefineHead(Head):
    """A linear prediction, then corrections from what does not meet at the borders of a patch (ours).

    It sees the true voxels beside a gap, and fills the gap without the encoder if it is trained together with one:
    runs of before are read with it, and `PictureHead` does its work now.
    """

    ROUNDS = 3

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = 2 * config.decoder_width
        self.faces = Faces(config)
        self.pred = nn.Linear(config.decoder_width, config.patch**3)
        self.mismatch = nn.Linear(self.faces.width, hidden)
        self.correction = nn.Linear(hidden, config.patch**3)

    def forward(self, decoded: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """See `Head.forward`."""
        pred_BSV: Tensor = self.pred(decoded)
        for _ in range(self.ROUNDS):
            seen = self.faces.seen(pred_BSV, ids_BS, known)
            pred_BSV = pred_BSV + self.correction(functional.gelu(self.mismatch(seen)))
        return self.faces.meet(pred_BSV, ids_BS, known)


class Cubes:
    """Predicted cubes, `reach` voxels larger than a patch on all sides, and how they blend into patches."""

    def __init__(self, config: ModelConfig) -> None:
        self.patch, self.grid = config.patch, config.grid
        self.reach = max(1, config.patch // 8) if config.patch > 1 else 0
        self.edge = self.patch + 2 * self.reach

    def blend(self, cubes_BSQ: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """Fade the cubes of tokens ``ids_BS`` into each other: their patches, ``[B, S, V]``.

        A visible token, should it be predicted as well, reaches into no other: no loss has taught it to.
        """
        visible_BL = torch.zeros(len(ids_BS), math.prod(self.grid), device=ids_BS.device)
        visible_BL = visible_BL.scatter(1, known.ids_BN, known.usable_BN.to(visible_BL.dtype))
        fade_Q, own_Q = self._fade(ids_BS.device)
        weights_BSQ = torch.where(visible_BL.gather(1, ids_BS)[..., None] > 0, fade_Q * own_Q, fade_Q)
        weights_BSQ = weights_BSQ.to(cubes_BSQ.dtype)
        return self._overlap_add(cubes_BSQ * weights_BSQ, ids_BS) / self._overlap_add(weights_BSQ, ids_BS)

    def _fade(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the weight of each voxel of a cube, 1 inside and falling where cubes overlap, and which are its own.

        Both float32 ``[Q]``.
        """
        position = torch.arange(self.edge, device=device) + 0.5
        inward = torch.minimum(position, self.edge - position)
        ramp, own = (inward / max(1, 2 * self.reach)).clamp(max=1.0), (inward > self.reach).float()
        fade, inside = (one[:, None, None] * one[:, None] * one for one in (ramp, own))
        return fade.flatten(), inside.flatten()

    def _overlap_add(self, cubes_BSQ: Tensor, ids_BS: Tensor) -> Tensor:
        """Add up cubes where they overlap, axis by axis."""
        L = math.prod(self.grid)
        everywhere = with_tokens_at(cubes_BSQ.new_zeros(len(cubes_BSQ), L, cubes_BSQ.shape[-1]), ids_BS, cubes_BSQ)
        cubes = everywhere.transpose(1, 2).reshape(-1, *(self.edge,) * 3, *self.grid)
        for axis in range(3):
            voxel, token = 1 + axis, 4 + axis
            before, own, after = torch.split(cubes, [self.reach, self.patch, self.reach], dim=voxel)
            own, last = own.clone(), self.grid[axis] - 1
            into_next = own.narrow(token, 1, last).narrow(voxel, 0, self.reach)
            into_next.add_(after.narrow(token, 0, last))
            into_last = own.narrow(token, 0, last).narrow(voxel, self.patch - self.reach, self.reach)
            into_last.add_(before.narrow(token, 1, last))
            cubes = own
        return tokens_at(cubes.flatten(1, 3).flatten(2).transpose(1, 2), ids_BS)


_HEADS: dict[str, Callable[[ModelConfig], Head]] = {
    "linear": LinearHead,
    "overlap": OverlapHead,
    "interpolate": InterpolateHead,
    "refine": RefineHead,
}


def make_head(config: ModelConfig) -> Head:
    """Make the head that a configuration names."""
    return _HEADS[config.head](config)
