"""A trained encoder as people use it: from a scan to tokens and one vector, with what the scan must be beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maesil.config.schema import ModelConfig
from maesil.downstream.card import Card, read_card
from maesil.downstream.export import load_net, write_card, write_weights
from maesil.downstream.hub import HubMixin, fetched
from maesil.downstream.whole_scan import ScanEmbedding, embed_scan
from maesil.errors import UsageError
from maesil.geometry import spacing_of
from maesil.ingest.maps import body_map, valid_map
from maesil.models.encoders import Backbone
from maesil.store.writer import Image
from maesil.types import AIR_HU, HuArray, Intensity, Spacing, Window, Zyx

_SAME_SPACING = 0.01
"""Spacings that differ by less than this share are the same."""


@dataclass(frozen=True)
class Preprocess:
    """What a scan must be before an encoder sees it. Window and normalisation are inside the encoder."""

    spacing: Spacing | None
    """mm along z, y, x; None where the encoder was trained on several spacings, or on scans as they were."""
    window: Window
    """HU; what lies beyond is clipped."""
    mean: float
    """Of the windowed values, in 0..1, see `maesil.types.Intensity`."""
    std: float
    crop: Zyx
    """Voxels of the crops it was trained on."""
    patch: Zyx
    """Voxels of the patch behind one token; edges of a crop are multiples of these."""
    orientation: str = "LPS"
    """Where x, y, z point: to the left, to the back, to the head. The axes of an array are z, y, x."""
    outside_hu: int = AIR_HU
    """What stands where there is no scan."""


class Encoder(nn.Module, HubMixin):
    """A trained encoder. `maesil.load_encoder` loads one; it is in evaluation mode then.

    ``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` are those of ``huggingface_hub``. Without that package
    the first two work for folders of this machine.
    """

    def __init__(self, net: Backbone, spacing: Spacing | None = None, card: Card | None = None) -> None:
        super().__init__()
        self.net = net
        self.card = card
        crop, patch = net.config.crop_zyx, net.config.patch_zyx
        values = net.intensity
        self.preprocess = Preprocess(spacing, values.window, values.mean, values.std, crop, patch)
        self.train(net.training)

    @property
    def width(self) -> int:
        """Channels D of a token."""
        return self.net.width

    @property
    def config(self) -> ModelConfig:
        """The model that it is the encoder of."""
        return self.net.config

    @property
    def intensity(self) -> Intensity:
        """How HU become the numbers that the first layer sees."""
        return self.net.intensity

    def forward_features(self, volume_BZYX: Tensor) -> Tensor:
        """Encode int16 HU ``[B, Z, Y, X]``: tokens ``[B, L, D]``, token ``(iz * gy + iy) * gx + ix``.

        Edges may be any multiples of those of a patch; the model was trained on crops of ``preprocess.crop`` voxels.
        Voxels outside a scan are -1024. ValueError for another dtype or shape.
        """
        return self.net.forward_features(volume_BZYX)

    def forward(self, volume_BZYX: Tensor) -> Tensor:
        """See `forward_features`."""
        return self.forward_features(volume_BZYX)

    def embed(self, volume: Image | HuArray | Tensor) -> ScanEmbedding:
        """Encode a whole scan, of any size: a grid of tokens and one pooled vector.

        ``volume`` is what `maesil.read_ct` gives, or int16 HU ``[Z, Y, X]`` of the spacing ``preprocess.spacing`` with
        its axes to the head, the back and the left. UsageError for a scan of another spacing, and for an array where
        the spacing of the encoder is not known.
        """
        if isinstance(volume, Image):
            self._require_spacing(spacing_of(volume.affine))
            return embed_scan(self.net, volume)
        return embed_scan(self.net, self._image(np.asarray(torch.as_tensor(volume).cpu())))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, device: torch.device | str = "cpu", **options: Any) -> Encoder:
        folder = fetched(model_id, **options)
        card = read_card(folder)
        return cls(load_net(folder, device), card.spacing, card)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.card is None:
            raise UsageError("expected an encoder of `maesil export`, found one without a card; export its run")
        weights = write_weights(save_directory, self.net)
        same = weights.sha256 == self.card.weights.sha256
        # Scores are those of the weights that were scored.
        write_card(save_directory, replace(self.card, weights=weights, scores=self.card.scores if same else ()))

    def _require_spacing(self, found: Spacing) -> None:
        expected = self.preprocess.spacing
        if expected is not None and not np.allclose(found, expected, rtol=_SAME_SPACING):
            raise UsageError(
                f"expected a scan of {_told(expected)}, as this encoder was trained on, found {_told(found)}; "
                "read it by maesil.read_ct(path, encoder.preprocess.spacing)"
            )

    def _image(self, hu: HuArray) -> Image:
        spacing = self.preprocess.spacing
        if hu.ndim != 3 or hu.dtype != np.int16:
            raise UsageError(f"expected int16 HU [Z, Y, X], found {hu.dtype} {list(hu.shape)}")
        if spacing is None:
            raise UsageError("expected what maesil.read_ct gives, found an array, of which no spacing is known")
        affine = np.eye(4)
        affine[:3, :3] = np.diag(spacing)[::-1]
        # A voxel of -1024 HU may be air of a scan; a whole cell of them is none.
        valid = np.where(valid_map(hu > AIR_HU) > 0, valid_map(np.ones(hu.shape, bool)), np.uint8(0))
        return Image(hu, affine, valid, body_map(hu, valid, spacing))


def net_of(encoder: Encoder | Backbone) -> Backbone:
    """Return the encoder of crops, which knows no scans."""
    return encoder.net if isinstance(encoder, Encoder) else encoder


def load_encoder(place: Path | str, device: torch.device | str = "cpu") -> Encoder:
    """Load an encoder: a folder that `maesil export` wrote, or USER/NAME on the Hugging Face Hub.

    It is a module with ``forward_features``, ``embed`` and ``preprocess``. Weights are float32, and tokens are too
    unless autocast says otherwise. CheckpointError for what is no whole export, DamagedError for a card that was
    altered, UsageError for a name without ``huggingface_hub``.
    """
    return Encoder._from_pretrained(model_id=str(place), device=device)


def _told(spacing: Spacing) -> str:
    return f"{' x '.join(f'{mm:g}' for mm in spacing)} mm (z, y, x)"
