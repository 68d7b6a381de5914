"""The head for pictures: fitted beside a model, and kept away from it.

Shapes: B samples, S tokens to predict, E decoder width, V voxels of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from maesil.config.schema import ModelConfig
from maesil.models.faces import Faces, Known


class PictureHead(nn.Module):
    """Turns the draft of a model into pictures without a grid; no gradient of it reaches the model (ours).

    A head for learning must not see the true voxels beside a gap: it would fill the gap from them, and the encoder
    would learn nothing. A head for pictures may. This one starts from the draft and corrects it in rounds, each with an
    MLP of its own that all patches share. An MLP sees the *mismatch* at the six faces of a patch (`Faces`) and the
    decoded token. In the end, the mismatch that is left between two predicted patches is shared out over the half of
    each that lies next to the border.
    """

    ROUNDS = 3

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        voxels, hidden = config.patch_voxels, 2 * config.decoder_width
        self.faces = Faces(config)
        seen = self.faces.width + config.decoder_width
        self.see = nn.ModuleList(nn.Linear(seen, hidden) for _ in range(self.ROUNDS))
        self.correct = nn.ModuleList(nn.Linear(hidden, voxels) for _ in range(self.ROUNDS))

    @torch.no_grad()
    def start_small(self) -> None:
        """Let the head, its weights being drawn, start as one that hardly changes the draft."""
        for correct in self.correct:
            assert isinstance(correct, nn.Linear)
            correct.weight.mul_(0.01)

    def forward(self, decoded_BSE: Tensor, draft_BSV: Tensor, ids_BS: Tensor, known: Known) -> Tensor:
        """Refine the draft of tokens ``ids_BS``: ``[B, S, V]``."""
        decoded_BSE, pred_BSV = decoded_BSE.detach(), draft_BSV.detach()
        for see, correct in zip(self.see, self.correct, strict=True):
            seen = torch.cat([self.faces.seen(pred_BSV, ids_BS, known), decoded_BSE], dim=-1)
            pred_BSV = pred_BSV + correct(functional.gelu(see(seen)))
        return self.faces.meet(pred_BSV, ids_BS, known)
