"""An encoder with a light decoder, for segmentation; losses and scores where labels are there.

Shapes: B samples, Z Y X voxels, L tokens, D width of a token, z y x the grid of tokens, C channels, K classes with the
background as the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from maesil.downstream.labels import UNLABELLED
from maesil.models.encoders import Backbone
from maesil.models.patches import halvings

WINDOWS = ((-1000.0, -300.0), (-200.0, 300.0), (100.0, 1000.0))
"""HU of the three views of the image (lung, soft tissue, bone) that the decoder is given at full resolution."""
_LEAST_CHANNELS, _LAST_CHANNELS = 8, 16


class Segmenter(nn.Module):
    """Tokens onto their grid, doubled until they are voxels; the image itself comes in at the last stage alone.

    With ``half_resolution`` the last doubling is left to the logits: the decoder works on cells of two voxels, and
    the logits are interpolated. A step takes a fifth of the time on a CPU, and edges are blunter.
    """

    def __init__(self, encoder: Backbone, classes: int, channels: int = 32, *, half_resolution: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        doublings = halvings(encoder.config.patch)
        self._cell = doublings.pop(0) if half_resolution and doublings else (1, 1, 1)
        stages: list[nn.Module] = [nn.Conv3d(encoder.width, channels, 1)]
        for step in reversed(doublings):
            narrower = max(_LEAST_CHANNELS, channels // 2)
            stages += [nn.Upsample(scale_factor=step, mode="trilinear"), nn.Conv3d(channels, narrower, 3, padding=1)]
            stages += [nn.GroupNorm(4, narrower), nn.GELU()]
            channels = narrower
        self.decoder = nn.Sequential(*stages)
        # No normalisation from here on: whether a voxel is bone is a matter of its HU, not of its crop's.
        self.classify = nn.Sequential(
            nn.Conv3d(channels + len(WINDOWS), _LAST_CHANNELS, 3, padding=1),
            nn.GELU(),
            nn.Conv3d(_LAST_CHANNELS, _LAST_CHANNELS, 1),
            nn.GELU(),
            nn.Conv3d(_LAST_CHANNELS, classes, 1),
        )

    def forward(self, volume_BZYX: Tensor) -> Tensor:
        """Score the classes of every voxel of int16 HU crops: logits ``[B, K, Z, Y, X]``."""
        tokens_BLD = self.encoder.forward_features(volume_BZYX)
        grid = self.encoder.grid(volume_BZYX)
        field_BCZYX = self.decoder(tokens_BLD.transpose(1, 2).reshape(len(volume_BZYX), -1, *grid))
        views = functional.avg_pool3d(windowed(volume_BZYX), self._cell).to(field_BCZYX)
        logits: Tensor = self.classify(torch.cat([field_BCZYX, views], dim=1))
        if max(self._cell) == 1:
            return logits
        return functional.interpolate(logits, volume_BZYX.shape[1:], mode="trilinear")


def windowed(volume_BZYX: Tensor) -> Tensor:
    """Return int16 HU through each of `WINDOWS`, which becomes -1 to 1: ``[B, 3, Z, Y, X]``."""
    hu = volume_BZYX.float()
    return torch.stack([(hu.clamp(lo, hi) - lo) / (hi - lo) * 2 - 1 for lo, hi in WINDOWS], dim=1)


def segmentation_loss(logits_BKZYX: Tensor, labels_BZYX: Tensor) -> Tensor:
    """Cross entropy plus soft Dice (arXiv 1606.04797) over the labelled voxels; 0 where there is none."""
    labelled, truth = labels_BZYX != UNLABELLED, labels_BZYX.long()
    entropy = functional.cross_entropy(logits_BKZYX, truth, ignore_index=UNLABELLED, reduction="sum")
    classes = torch.arange(1, logits_BKZYX.shape[1], device=truth.device).view(-1, 1, 1, 1)
    is_class_BKZYX = labels_BZYX[:, None] == classes
    share = logits_BKZYX.softmax(dim=1)[:, 1:] * labelled[:, None]
    axes = (0, 2, 3, 4)
    both, sizes = (share * is_class_BKZYX).sum(axes), share.sum(axes) + is_class_BKZYX.sum(axes)
    dice = (2 * both + 1) / (sizes + 1)
    count = labelled.sum()
    return entropy / count.clamp_min(1) + (1 - dice.mean()) * (count > 0)


@dataclass
class DiceSums:
    """Voxels of each class in the truth, in the prediction and in both, added up over the crops of a volume."""

    classes: int
    """Without the background."""
    both: Tensor = field(init=False)
    sizes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.both, self.sizes = torch.zeros(self.classes), torch.zeros(self.classes)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Add voxels; unlabelled ones count nowhere."""
        labelled = truth != UNLABELLED
        one, other = predicted[labelled], truth[labelled]
        for k in range(self.classes):
            a, b = one == k + 1, other == k + 1
            self.both[k] += int((a & b).sum())
            self.sizes[k] += int(a.sum()) + int(b.sum())

    @property
    def dice(self) -> list[float | None]:
        """Dice of each class; None where neither truth nor prediction holds any of it."""
        pairs = zip(self.both.tolist(), self.sizes.tolist(), strict=True)
        return [2 * both / size if size else None for both, size in pairs]
