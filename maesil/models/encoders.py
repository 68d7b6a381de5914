"""The encoder of a trained model by itself: int16 HU in, one token per patch out, nothing hidden.

Window and normalisation are inside, so whoever uses it hands over voxels as they are in a store or in a scan.
Shapes: B samples, Z Y X voxels (multiples of the edges of a patch), V voxels of a patch, g patches along an axis,
L = gz * gy * gx tokens in the order of `maesil.kernels`, D channels of a token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from maesil import kernels
from maesil.config.schema import ModelConfig
from maesil.models.autoencoders import Autoencoder, VariationalAutoencoder
from maesil.models.masked_autoencoder import MaskedAutoencoder, ReconstructionModel, sincos_positions
from maesil.models.patches import unpatchify
from maesil.models.primus import PrimusAutoencoder, codes_on_grid, rotary_positions, with_registers
from maesil.models.registry import make_model
from maesil.models.slice_mae import SliceMaskedAutoencoder
from maesil.types import Intensity, Zyx, edges_told


class Backbone(nn.Module, ABC):
    """What every encoder offers, whatever it was trained as: from crops to tokens. `maesil.Encoder` takes scans."""

    width: int
    """Channels D of a token."""

    def __init__(self, config: ModelConfig, intensity: Intensity) -> None:
        super().__init__()
        self.config = config
        self.intensity = intensity

    def forward_features(self, volume_BZYX: Tensor) -> Tensor:
        """Encode int16 HU ``[B, Z, Y, X]``: tokens ``[B, L, D]``, token ``(iz * gy + iy) * gx + ix``.

        Edges may be any multiples of those of a patch; the model was trained on crops of ``config.crop`` voxels of the
        spacing of its store. Voxels outside a scan are -1024. ValueError for another dtype or shape.
        """
        patches_BLV = self.patches(volume_BZYX)
        return self.encode(patches_BLV, self.grid(volume_BZYX))

    def forward(self, volume_BZYX: Tensor) -> Tensor:
        """See `forward_features`."""
        return self.forward_features(volume_BZYX)

    def grid(self, volume_BZYX: Tensor) -> Zyx:
        """Return the tokens along z, y, x of crops."""
        z, y, x = (n // P for n, P in zip(volume_BZYX.shape[1:], self.config.patch_zyx, strict=True))
        return z, y, x

    @abstractmethod
    def encode(self, patches_BLV: Tensor, grid: Zyx) -> Tensor:
        """Encode all patches of a grid, windowed and normalised: ``[B, L, V]`` to ``[B, L, D]``."""

    def patches(self, volume_BZYX: Tensor) -> Tensor:
        """Cut all patches, windowed and normalised as the encoder sees them: ``[B, L, V]``."""
        patch, shape = self.config.patch_zyx, volume_BZYX.shape
        edges_fit = len(shape) == 4 and shape[0] > 0
        edges_fit = edges_fit and all(n % P == 0 and n >= P for n, P in zip(shape[1:], patch, strict=True))
        if not edges_fit or volume_BZYX.dtype != torch.int16:
            raise ValueError(
                f"expected int16 HU [B, Z, Y, X] with edges that are multiples of {edges_told(patch)}, "
                f"found {volume_BZYX.dtype} {list(shape)}"
            )
        device, dtype = volume_BZYX.device, next(self.parameters()).dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        ids_BL = torch.arange(math.prod(self.grid(volume_BZYX)), device=device).expand(len(volume_BZYX), -1)
        return kernels.gather_patches(
            volume_BZYX, ids_BL, patch_size=patch, window=self.intensity.window, mean=self.intensity.mean,
            std=self.intensity.std, dtype=dtype,
        )  # fmt: skip


@runtime_checkable
class HasNet(Protocol):
    """What holds an encoder, as `maesil.Encoder` does, which also knows the spacing of its scans."""

    @property
    def net(self) -> Backbone:
        """The encoder of crops."""


class VitEncoder(Backbone):
    """The transformer of ``maesil``: its parts and their names are those of `MaskedAutoencoder`."""

    pos_embed: Tensor

    def __init__(self, model: MaskedAutoencoder, intensity: Intensity) -> None:
        super().__init__(model.config, intensity)
        self.width = model.config.width
        self.patch_embed, self.blocks, self.norm = model.patch_embed, model.blocks, model.norm
        # In the file of weights, so that a program without maesil need not make it anew.
        self.register_buffer("pos_embed", model.pos_embed.clone())

    def encode(self, patches_BLV: Tensor, grid: Zyx) -> Tensor:
        """See `Backbone.encode`."""
        tokens_BLD: Tensor = self.patch_embed(patches_BLV) + self._positions(grid)
        for block in self.blocks:
            tokens_BLD = block(tokens_BLD)
        latent_BLD: Tensor = self.norm(tokens_BLD)
        return latent_BLD

    def _positions(self, grid: Zyx) -> Tensor:
        # A program takes any grid, so it always makes them anew; on the grid of training they are the same.
        if not torch.compiler.is_exporting() and grid == self.config.grid:
            return self.pos_embed
        return sincos_positions(grid, self.width).to(self.pos_embed)


class PrimusEncoder(Backbone):
    """The transformer of ``primus``: its parts and their names are those of `PrimusAutoencoder`."""

    def __init__(self, model: PrimusAutoencoder, intensity: Intensity) -> None:
        super().__init__(model.config, intensity)
        self.width = model.config.width
        self.patch_embed, self.blocks, self.norm = model.patch_embed, model.blocks, model.norm
        self.pos_embed, self.register_tokens = model.pos_embed, model.register_tokens

    def encode(self, patches_BLV: Tensor, grid: Zyx) -> Tensor:
        """See `Backbone.encode`."""
        registers = self.config.registers
        codes = codes_on_grid(self.pos_embed, registers, self.config.grid, grid)
        tokens = with_registers(self.patch_embed(patches_BLV) + codes[registers:], self.register_tokens, codes)
        rotary = rotary_positions(grid, self.width // self.config.heads)[None].to(tokens.device)
        for block in self.blocks:
            tokens = block(tokens, rotary)
        latent_BLD: Tensor = self.norm(tokens)[:, registers:]
        return latent_BLD


class SliceEncoder(Backbone):
    """The transformer of ``mae2d``: slices are encoded one by one; a token is the mean over the slices of its patch."""

    def __init__(self, model: SliceMaskedAutoencoder, intensity: Intensity) -> None:
        super().__init__(model.config, intensity)
        self.width = model.config.width
        self.patch_embed, self.blocks, self.norm = model.patch_embed, model.blocks, model.norm

    def encode(self, patches_BLV: Tensor, grid: Zyx) -> Tensor:
        """See `Backbone.encode`."""
        (P, PY, PX), (gz, gy, gx) = self.config.patch_zyx, grid
        slices = patches_BLV.reshape(-1, gy * gx, P, PY * PX).transpose(1, 2).flatten(0, 1)
        tokens = self.patch_embed(slices) + sincos_positions((1, gy, gx), self.width).to(self.norm.weight)
        for block in self.blocks:
            tokens = block(tokens)
        latent: Tensor = self.norm(tokens).reshape(-1, P, gy * gx, self.width).mean(dim=1)
        return latent.reshape(patches_BLV.shape[0], gz * gy * gx, self.width)


class ConvEncoder(Backbone):
    """The convolutions of ``ae``, ``vae`` (mean of the code) and ``vqvae`` (the code before it is quantised)."""

    def __init__(self, model: Autoencoder, intensity: Intensity) -> None:
        super().__init__(model.config, intensity)
        self.width = model.config.latent
        self.encoder = model.encoder
        self._mean_alone = isinstance(model, VariationalAutoencoder)

    def encode(self, patches_BLV: Tensor, grid: Zyx) -> Tensor:
        """See `Backbone.encode`."""
        voxels_BZYX = unpatchify(patches_BLV, grid, self.config.patch)
        nothing_hidden = torch.zeros_like(voxels_BZYX)
        code_Bczyx: Tensor = self.encoder(torch.stack([voxels_BZYX, nothing_hidden], dim=1))
        if self._mean_alone:
            code_Bczyx = code_Bczyx.chunk(2, dim=1)[0]
        return code_Bczyx.flatten(2).transpose(1, 2)


def encoder_of(model: ReconstructionModel, intensity: Intensity) -> Backbone:
    """Return the encoder of a model, in evaluation mode; it shares the model's weights."""
    if isinstance(model, PrimusAutoencoder):
        encoder: Backbone = PrimusEncoder(model, intensity)
    elif isinstance(model, MaskedAutoencoder):
        encoder = VitEncoder(model, intensity)
    elif isinstance(model, SliceMaskedAutoencoder):
        encoder = SliceEncoder(model, intensity)
    elif isinstance(model, Autoencoder):
        encoder = ConvEncoder(model, intensity)
    else:
        raise TypeError(f"expected a model of maesil.models.registry, found {type(model).__name__}")
    return encoder.eval()


def untrained_encoder(config: ModelConfig, intensity: Intensity, seed: int) -> Backbone:
    """Make an encoder of the same architecture with weights drawn as at the start of training."""
    model = make_model(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return encoder_of(model, intensity)
