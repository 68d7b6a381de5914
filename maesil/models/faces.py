"""The faces of patches: what lies beyond them, what does not meet there, and how a step is shared out.

Shapes: B samples, L tokens of the grid (gz, gy, gx), N visible, S to predict, V voxels of a patch,
F voxels of one face: those of the same axis are equally large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from maesil.config.schema import ModelConfig
from maesil.models.patches import token_rows, tokens_at, with_tokens_at
from maesil.types import Edges, Zyx, zyx


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
        faces = [one.flatten() for one in voxels_of_faces(config.patch, 1)]
        self.sizes = [len(one) for one in faces]
        """Voxels of the two faces of each axis."""
        self.width = sum(self.sizes) + 12
        """Numbers that `seen` returns for a patch."""
        beside, inside = neighbours(config.grid)
        for name, value in (
            ("voxels_of_faces", torch.cat(faces)),
            ("neighbours_L6", beside),
            ("inside_L6", inside),
            ("sharing_out", sharing_out(config.patch)),
        ):
            self.register_buffer(name, value, persistent=False)

    def seen(self, pred_BSV: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """Return the mismatch at the faces of each patch and the states of its neighbours, ``[B, S, width]``."""
        faces, states_BS62 = self.mismatch(pred_BSV, ids_BS, known)
        return torch.cat([*(one.flatten(2) for one in faces), states_BS62.flatten(2)], dim=-1)

    def meet(self, pred_BSV: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """Share out what mismatch is left between two predicted patches, so that no step between them shows."""
        faces, states_BS62 = self.mismatch(pred_BSV, ids_BS, known)
        predicted = (1 - states_BS62[..., 1:]).chunk(3, dim=2)
        between_predicted = [(one * both).flatten(2) for one, both in zip(faces, predicted, strict=True)]
        return pred_BSV + torch.cat(between_predicted, dim=-1) @ self.sharing_out.to(pred_BSV.dtype)

    def mismatch(self, pred_BSV: Tensor, ids_BS: Tensor, known: Known) -> tuple[list[Tensor], Tensor]:
        """Return what each patch's neighbours show beyond its faces less those faces, and the neighbours' states.

        For each axis ``[B, S, 2, F]``, 0 where there is no neighbour; and ``[B, S, 6, 2]``: is it there, is it true.
        """
        canvas_BLV, state_BL2 = self._canvas(pred_BSV, ids_BS, known)
        # Voxels first, so that a face is a few whole rows, and back.
        rows_VN = canvas_BLV.flatten(0, 1).T.contiguous()
        beside_BS6 = self.neighbours_L6[ids_BS]
        rows = token_rows(beside_BS6, canvas_BLV.shape[1]).view(beside_BS6.shape)
        states_BS62 = state_BL2.flatten(0, 1)[rows] * self.inside_L6[ids_BS][..., None]
        faces = []
        for axis, voxels in enumerate(torch.split(self.voxels_of_faces, self.sizes)):
            sides = slice(2 * axis, 2 * axis + 2)
            faces_NF = rows_VN.index_select(0, voxels).T.contiguous()
            ours = tokens_at(faces_NF.reshape(*canvas_BLV.shape[:2], -1), ids_BS).reshape(*ids_BS.shape, 2, -1)
            # Of the neighbour at a side, the face that is turned to us: the other one of the axis.
            turned = 2 * rows[..., sides] + torch.arange(1, -1, -1, device=rows.device)
            theirs = faces_NF.view(-1, ours.shape[-1]).index_select(0, turned.flatten()).view_as(ours)
            faces.append((theirs - ours) * states_BS62[:, :, sides, :1])
        return faces, states_BS62

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


def voxels_of_faces(patch: Edges, layers: int) -> list[Tensor]:
    """Return the flat voxel numbers of the two faces of a patch (before, after) along z, y, x: ``[2, layers, F]``.

    The outermost layer comes first.
    """
    edges = zyx(patch)
    number = torch.arange(math.prod(edges)).reshape(edges)
    slices = [number.movedim(axis, 0).flatten(1) for axis in range(3)]
    return [torch.stack([one[:layers], one.flip(0)[:layers]]) for one in slices]


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


def sharing_out(patch: Edges) -> Tensor:
    """Return how a mismatch at each face spreads into a patch, half of it at the border, none in the middle.

    Float32, a row for each voxel of the six faces, in the order of `voxels_of_faces`, and a column for each of the
    patch.
    """
    edges, rows = zyx(patch), []
    for axis, edge in enumerate(edges):
        depth = torch.arange(edge) + 0.5
        share = 0.5 * (1 - depth / (edge / 2)).clamp_min(0)
        for layers in voxels_of_faces(edges, edge)[axis]:
            of_face = torch.arange(layers.shape[1])
            spread = torch.zeros(layers.shape[1], math.prod(edges))
            for layer, voxels in enumerate(layers):
                spread[of_face, voxels] = share[layer]
            rows.append(spread)
    return torch.cat(rows)
