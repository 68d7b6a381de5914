"""The faces of patches: what lies beyond them, what does not meet there, and how a step is shared out.

Shapes: B samples, L tokens of the grid (gz, gy, gx), N visible, S to predict, P patch edge, V = P^3 voxels of a patch,
F = P^2 voxels of one face.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from maesil.config.schema import ModelConfig
from maesil.models.patches import token_rows, tokens_at, with_tokens_at
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


class Faces(nn.Module):
    """What does not meet where patches touch.

    The *mismatch* at a face is what the neighbour shows beyond it less what the patch shows: true voxels where the
    neighbour is visible, its own prediction where it is not. All is done token by token: no convolution over voxels.
    """

    voxels_of_faces: Tensor
    neighbours_L6: Tensor
    inside_L6: Tensor
    sharing_out: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.width = 6 * config.patch**2 + 12
        """Numbers that `seen` returns for a patch."""
        beside, inside = neighbours(config.grid)
        for name, value in (
            ("voxels_of_faces", voxels_of_faces(config.patch, 1)),
            ("neighbours_L6", beside),
            ("inside_L6", inside),
            ("sharing_out", sharing_out(config.patch)),
        ):
            self.register_buffer(name, value, persistent=False)

    def seen(self, pred_BSV: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """Return the mismatch at the faces of each patch and the states of its neighbours, ``[B, S, width]``."""
        faces_BS6F, states_BS62 = self.mismatch(pred_BSV, ids_BS, known)
        return torch.cat([faces_BS6F.flatten(2), states_BS62.flatten(2)], dim=-1)

    def meet(self, pred_BSV: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """Share out what mismatch is left between two predicted patches, so that no step between them shows."""
        faces_BS6F, states_BS62 = self.mismatch(pred_BSV, ids_BS, known)
        between_predicted = faces_BS6F * (1 - states_BS62[..., 1:])
        return pred_BSV + between_predicted.flatten(2) @ self.sharing_out.to(pred_BSV.dtype)

    def mismatch(self, pred_BSV: Tensor, ids_BS: Tensor, known: Known) -> tuple[Tensor, Tensor]:
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
