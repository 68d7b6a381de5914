"""Output heads: from decoded tokens to voxels. The plain linear one leaves the grid of patches in the picture.

MAESIL (arXiv 2604.00514) names fixed-pattern artifacts of its decoder as its limitation. The other heads avoid them,
each in its own way; `maesil.evaluation.metrics.BorderSums` measures what is left, ``docs/explanation/heads.md``
tells how much.

Shapes: B samples, L tokens of the grid (gz, gy, gx), S tokens to predict, E decoder width, P patch edge, V = P^3,
F = P^2 voxels of one face, C channels, Z Y X voxels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from maesil.config.schema import ModelConfig
from maesil.models.patches import patchify, token_rows, tokens_at, with_tokens_at
from maesil.types import Zyx


@dataclass(frozen=True)
class Known:
    """The true patches that a head may use: the visible ones, unless they are to be predicted themselves."""

    patches_BNV: Tensor
    """Normalised voxels of the visible patches."""
    ids_BN: Tensor
    """Their tokens."""
    usable_BN: Tensor
    """Bool: False where the token is itself to be predicted (mask kind ``none``)."""


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

    What makes the grid visible is the step between a patch's faces and those of its six neighbours: true voxels where
    a neighbour is visible, its own prediction where it is not. That mismatch goes through an MLP shared by all patches
    and comes back as a correction of the whole patch, `ROUNDS` times, so that patches without a visible neighbour are
    reached too. In the end, what mismatch is left between two predicted patches is shared out over the half of each
    that lies next to the border. All is done token by token: no convolution over voxels.
    """

    ROUNDS = 3

    voxels_of_faces: Tensor
    neighbours_L6: Tensor
    inside_L6: Tensor
    sharing_out: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch, self.grid = config.patch, config.grid
        hidden = 2 * config.decoder_width
        self.pred = nn.Linear(config.decoder_width, config.patch**3)
        self.mismatch = nn.Linear(6 * config.patch**2 + 12, hidden)
        self.correction = nn.Linear(hidden, config.patch**3)
        self.register_buffer("voxels_of_faces", voxels_of_faces(config.patch, 1), persistent=False)
        beside, inside = neighbours(config.grid)
        self.register_buffer("neighbours_L6", beside, persistent=False)
        self.register_buffer("inside_L6", inside, persistent=False)
        self.register_buffer("sharing_out", sharing_out(config.patch), persistent=False)

    def forward(self, decoded: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """See `Head.forward`."""
        pred_BSV: Tensor = self.pred(decoded)
        for _ in range(self.ROUNDS):
            faces_BS6F, states_BS62 = self._mismatch(pred_BSV, ids_BS, known)
            seen = torch.cat([faces_BS6F.flatten(2), states_BS62.flatten(2)], dim=-1)
            pred_BSV = pred_BSV + self.correction(functional.gelu(self.mismatch(seen)))
        faces_BS6F, states_BS62 = self._mismatch(pred_BSV, ids_BS, known)
        between_predicted = faces_BS6F * (1 - states_BS62[..., 1:])
        return pred_BSV + between_predicted.flatten(2) @ self.sharing_out.to(pred_BSV.dtype)

    def _mismatch(self, pred_BSV: Tensor, ids_BS: Tensor, known: Known) -> tuple[Tensor, Tensor]:
        """Return what each patch's neighbours show beyond its faces less those faces, and the neighbours' states.

        ``[B, S, 6, F]``, 0 where there is no neighbour, and ``[B, S, 6, 2]``: is it there, is it true.
        """
        canvas_BLV, state_BL2 = self._canvas(pred_BSV, ids_BS, known)
        # Voxels first, so that a face is a few whole rows, and back.
        rows_VN = canvas_BLV.flatten(0, 1).T.contiguous()
        faces_NF = rows_VN.index_select(0, self.voxels_of_faces.flatten()).T.contiguous()
        ours_BS6F = tokens_at(faces_NF.reshape(*canvas_BLV.shape[:2], -1), ids_BS).reshape(*ids_BS.shape, 6, -1)
        beside_BS6 = self.neighbours_L6[ids_BS]
        rows = token_rows(beside_BS6, canvas_BLV.shape[1]).view(beside_BS6.shape)
        # Of the neighbour at a side, the face that is turned to us: sides come in pairs.
        turned = torch.arange(6, device=rows.device) ^ 1
        theirs_BS6F = faces_NF.view(-1, ours_BS6F.shape[-1]).index_select(0, (6 * rows + turned).flatten())
        there_BS6 = self.inside_L6[ids_BS]
        states_BS62 = state_BL2.flatten(0, 1)[rows] * there_BS6[..., None]
        return (theirs_BS6F.view_as(ours_BS6F) - ours_BS6F) * states_BS62[..., :1], states_BS62

    def _canvas(self, pred_BSV: Tensor, ids_BS: Tensor, known: Known) -> tuple[Tensor, Tensor]:
        """Return all patches that are there, true ones before predicted ones, and (there, true) of each token."""
        B, _, V = pred_BSV.shape
        L = math.prod(self.grid)
        canvas = with_tokens_at(pred_BSV.new_zeros(B, L, V), ids_BS, pred_BSV)
        true_BNV = known.patches_BNV.to(pred_BSV.dtype)
        true_BNV = torch.where(known.usable_BN[..., None], true_BNV, tokens_at(canvas, known.ids_BN))
        true = pred_BSV.new_zeros(B, L).scatter(1, known.ids_BN, known.usable_BN.to(pred_BSV.dtype))
        there = torch.scatter(true, 1, ids_BS, 1.0)
        return with_tokens_at(canvas, known.ids_BN, true_BNV), torch.stack([there, true], dim=-1)


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


def voxels_of_faces(patch: int, layers: int) -> Tensor:
    """Return the flat voxel numbers of a patch's six faces (z-, z+, y-, y+, x-, x+): int64 ``[6, layers, P^2]``.

    The outermost layer comes first.
    """
    number = torch.arange(patch**3).reshape(patch, patch, patch)
    faces = []
    for axis in range(3):
        slices = number.movedim(axis, 0).flatten(1)
        faces += [slices[:layers], slices.flip(0)[:layers]]
    return torch.stack(faces)


def neighbours(grid: Zyx) -> tuple[Tensor, Tensor]:
    """Return the tokens beside each token (z-, z+, y-, y+, x-, x+) and whether the grid has one there.

    int64 and float32 ``[L, 6]``; where there is none, the token's own number stands in.
    """
    tokens = torch.arange(grid[0] * grid[1] * grid[2]).reshape(grid)
    padded = functional.pad(tokens, (1, 1) * 3, value=-1)
    inner = (slice(1, -1),) * 3
    beside = torch.stack([padded.roll(-s, axis)[inner].flatten() for axis in range(3) for s in (-1, 1)], dim=1)
    own = tokens.flatten()[:, None].expand(-1, 6)
    return torch.where(beside < 0, own, beside), (beside >= 0).float()


def sharing_out(patch: int) -> Tensor:
    """Return how a mismatch at each face spreads into a patch, half of it at the border, none in the middle.

    Float32 ``[6 P^2, P^3]``, faces in the order of `voxels_of_faces`.
    """
    depth = torch.arange(patch) + 0.5
    share = 0.5 * (1 - depth / (patch / 2)).clamp_min(0)
    spread = torch.zeros(6, patch**2, patch**3)
    for side, layers in enumerate(voxels_of_faces(patch, patch)):
        for layer, voxels in enumerate(layers):
            spread[side, torch.arange(patch**2), voxels] = share[layer]
    return spread.flatten(0, 1)
