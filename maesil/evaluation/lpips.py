"""LPIPS of axial slices (Zhang et al., arXiv 1801.03924), where the weights of its network are given.

The linear layers on top come with torchmetrics, the network below them, AlexNet, from torchvision; its weights are
downloaded by nobody but the user. Shapes: Z Y X voxels of one volume, n slices, h w their size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maesil.errors import UsageError
from maesil.evaluation.metrics import clip
from maesil.types import Window

ENOUGH_BODY = 0.1
"""A slice counts if the body fills at least this share of the body's bounding rectangle (ours)."""

SMALLEST_SLICE = 32
"""AlexNet's strides leave nothing of images below this edge (pixels)."""

_PUBLISHED_SHA256 = "7be5be79"
"""How the SHA-256 of torchvision's AlexNet weights (IMAGENET1K_V1) begins: it is part of their file name."""

_EXPECTED = "expected the state dict of torchvision's alexnet (alexnet-owt-7be5be79.pth)"
_SLICES_AT_ONCE = 16


@dataclass(frozen=True)
class Lpips:
    """The perceptual distance by one network."""

    network: nn.Module
    sha256: str
    """Of the weights file, hex."""

    @classmethod
    def load(cls, weights: Path, device: torch.device) -> Lpips:
        """Load the backbone's weights; UsageError without torchmetrics and torchvision, or for another file."""
        state = _read_features(weights)
        network = _network()
        for name, parameter in network.net.named_parameters():
            # torchmetrics spreads the layers over five slices, but keeps their numbers: slice2.3.weight.
            layer = "features." + name.partition(".")[2]
            found = state.get(layer)
            if found is None or found.shape != parameter.shape:
                shape = "nothing" if found is None else tuple(found.shape)
                raise UsageError(f"{weights}: {_EXPECTED}, found {shape} for {layer} {tuple(parameter.shape)}")
            parameter.data.copy_(found)
        return cls(network.to(device), hashlib.sha256(weights.read_bytes()).hexdigest())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the scores must know."""
        if self.sha256.startswith(_PUBLISHED_SHA256):
            return ()
        return ("LPIPS: the weights are not those that torchvision publishes for AlexNet; compare with care.",)

    @torch.no_grad()
    def of_volume(
        self, reference_ZYX: Tensor, predicted_ZYX: Tensor, window: Window, *, valid_ZYX: Tensor, body_ZYX: Tensor
    ) -> float:
        """Return the mean distance over the axial slices with enough body; NaN where there is none, or it is too small.

        Slices are cut to the bounding rectangle of the body and clipped to the window, whose ends become -1 and 1;
        what is not valid is air in both. Nothing is resized.
        """
        slices, rectangle = body_slices(body_ZYX)
        height, width = (part.stop - part.start for part in rectangle)
        if not len(slices) or min(height, width) < SMALLEST_SLICE:
            return float("nan")
        lo, hi = window
        distances = []
        for z in torch.split(slices, _SLICES_AT_ONCE):
            images = []
            for volume in (reference_ZYX, predicted_ZYX):
                chosen = torch.where(valid_ZYX[z], clip(volume[z], window), lo)[:, *rectangle]
                images.append((2 * (chosen - lo) / (hi - lo) - 1)[:, None].expand(-1, 3, -1, -1).float())
            distances.append(self.network(*images).flatten())
        return float(torch.cat(distances).double().mean())


def body_slices(body_ZYX: Tensor) -> tuple[Tensor, tuple[slice, slice]]:
    """Return the slices with enough body (int64 ``[n]``), and the bounding rectangle of the whole body in y and x."""
    if not body_ZYX.any():
        return torch.zeros(0, dtype=torch.int64, device=body_ZYX.device), (slice(0, 0), slice(0, 0))
    y, x = (body_ZYX.any(dim=0).any(dim=other).nonzero().flatten() for other in (1, 0))
    rectangle = slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1)
    share = body_ZYX[:, *rectangle].float().mean(dim=(1, 2))
    return (share >= ENOUGH_BODY).nonzero().flatten(), rectangle


def _network() -> Any:
    """Return LPIPS by AlexNet: linear layers as published, the backbone still to be filled."""
    try:
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        return _NoTrainLpips(net="alex", pnet_rand=True)  # `pnet_rand`: torchmetrics downloads nothing
    except (ImportError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            "--lpips-weights: expected torchmetrics and a torchvision that fits the installed torch; install "
            f"maesil[lpips] (found: {reason})"
        ) from error


def _read_features(weights: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{weights}: {_EXPECTED}, found no file to read ({error.strerror})") from error
    except Exception as error:  # torch.load fails in a dozen ways on what is no state dict
        raise UsageError(f"{weights}: {_EXPECTED}, found another kind of file ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{weights}: {_EXPECTED}, found {type(state).__name__}")
    return state
