"""The 3D masked autoencoder, its parts named as in facebookresearch/mae ``models_mae.py`` (arXiv 2111.06377).

Shapes: B samples, Z Y X voxels, P patch edge, V = P^3 voxels of a patch, L tokens of the grid, N visible,
M hidden, D width (encoder), E width (decoder), H heads, d width of a head. Only `maesil.kernels` reads the
int16 volume: no float volume and no targets are built here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from maesil import kernels
from maesil.config import ModelConfig
from maesil.masking import Masks
from maesil.types import Intensity, Zyx


class MaskedAutoencoder(nn.Module):
    """Encode the visible patches, decode all positions, predict the voxels of the hidden ones."""

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        voxels, width, decoder_width = config.patch**3, config.width, config.decoder_width
        self.patch_embed = nn.Linear(voxels, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, voxels)

        # Fixed, and made again from the configuration: not part of the checkpoint.
        self.register_buffer("pos_embed", sincos_positions(config.grid, width), persistent=False)
        self.register_buffer("decoder_pos_embed", sincos_positions(config.grid, decoder_width), persistent=False)

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights anew, as MAE does: Xavier for linear layers, normal for the mask token."""
        nn.init.normal_(self.mask_token, std=0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, volume_BZYX: Tensor, masks: Masks, intensity: Intensity, flip: Tensor | None = None) -> Tensor:
        """Predict the hidden patches ``masks.ids_masked`` of crops: ``[B, M, V]`` in normalised units."""
        latent_BND = self.forward_encoder(volume_BZYX, masks, intensity, flip)
        decoded_BLE = self.forward_decoder(latent_BND, masks)
        pred_BMV: Tensor = self.decoder_pred(_tokens_at(decoded_BLE, masks.ids_masked))
        return pred_BMV

    def predict_all(
        self, volume_BZYX: Tensor, masks: Masks, intensity: Intensity, flip: Tensor | None = None
    ) -> Tensor:
        """Predict every patch, ``[B, L, V]`` in normalised units; no loss ever taught the visible ones."""
        latent_BND = self.forward_encoder(volume_BZYX, masks, intensity, flip)
        decoded_BLE = self.forward_decoder(latent_BND, masks)
        pred_BLV: Tensor = self.decoder_pred(decoded_BLE)
        return pred_BLV

    def forward_encoder(
        self, volume_BZYX: Tensor, masks: Masks, intensity: Intensity, flip: Tensor | None = None
    ) -> Tensor:
        """Encode the visible patches: ``[B, N, D]``."""
        patches_BNV = kernels.gather_patches(
            volume_BZYX, masks.ids_keep, patch_size=self.config.patch, window=intensity.window,
            mean=intensity.mean, std=intensity.std, dtype=self._input_dtype(volume_BZYX.device), flip=flip,
        )  # fmt: skip
        tokens_BND: Tensor = self.patch_embed(patches_BNV) + self.pos_embed[masks.ids_keep]
        for block in self.blocks:
            tokens_BND = block(tokens_BND)
        latent_BND: Tensor = self.norm(tokens_BND)
        return latent_BND

    def forward_decoder(self, latent_BND: Tensor, masks: Masks) -> Tensor:
        """Decode all positions from the encoded visible ones: ``[B, L, E]``."""
        visible_BNE = self.decoder_embed(latent_BND)
        tokens_BLE = kernels.unshuffle_tokens(visible_BNE, self.mask_token, self.decoder_pos_embed, masks.ids_restore)
        for block in self.decoder_blocks:
            tokens_BLE = block(tokens_BLE)
        decoded_BLE: Tensor = self.decoder_norm(tokens_BLE)
        return decoded_BLE

    def forward_loss(
        self,
        pred_BMV: Tensor,
        volume_BZYX: Tensor,
        masks: Masks,
        intensity: Intensity,
        weight_BM: Tensor | None = None,
        flip: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error over the hidden patches, each counting by its weight: a float32 scalar."""
        return kernels.masked_reconstruction_loss(
            pred_BMV, volume_BZYX, masks.ids_masked, patch_size=self.config.patch, window=intensity.window,
            mean=intensity.mean, std=intensity.std, weight=weight_BM, flip=flip,
        )  # fmt: skip

    def _input_dtype(self, device: torch.device) -> torch.dtype:
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.patch_embed.weight.dtype


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a four times wider MLP, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """``[B, N, D]`` to the same."""
        mixed_BND: Tensor = tokens_BND + self.attn(self.norm1(tokens_BND))
        out_BND: Tensor = mixed_BND + self.mlp(self.norm2(mixed_BND))
        return out_BND


class Attention(nn.Module):
    """Multi-head self-attention over all tokens it is given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """``[B, N, D]`` to the same, each head of width d by itself."""
        qkv_3BHNd = self.qkv(tokens_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BHNd = functional.scaled_dot_product_attention(*qkv_3BHNd.unbind(0))
        out_BND: Tensor = self.proj(mixed_BHNd.transpose(1, 2).flatten(2))
        return out_BND


def sincos_positions(grid: Zyx, width: int) -> Tensor:
    """Make fixed 3D sine-cosine position codes ``[L, width]``: a third of the channels for each of z, y, x.

    Where the width is not divisible by 6 the last channels are zero. In one axis, with F = width // 6
    frequencies, position p becomes sin(p w) and cos(p w) for w = 10^(-i/F), i = 0 .. F - 1 (arXiv 1706.03762,
    section 3.5, there with 10000; ours is 10, since on axes of 8 to 16 tokens most of the slower waves would be
    constants that teach attention nothing about neighbours).
    """
    frequencies = width // 6
    omega = 10.0 ** (-torch.arange(frequencies, dtype=torch.float64) / frequencies)
    index_zyx = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [index.reshape(-1, 1) * omega for index in index_zyx]
    codes = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return functional.pad(codes, (0, width - 6 * frequencies)).float()


def patchify(volume_BZYX: Tensor, patch: int) -> Tensor:
    """Cut volumes into patches: ``[B, L, P^3]``, tokens and voxels in the order of `maesil.kernels`."""
    B, Z, Y, X = volume_BZYX.shape
    cut = volume_BZYX.reshape(B, Z // patch, patch, Y // patch, patch, X // patch, patch)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, -1, patch**3)


def unpatchify(tokens_BLV: Tensor, grid: Zyx, patch: int) -> Tensor:
    """Put patches ``[B, L, P^3]`` together again: ``[B, Z, Y, X]``, the inverse of `patchify`."""
    B, (gz, gy, gx) = len(tokens_BLV), grid
    cut = tokens_BLV.reshape(B, gz, gy, gx, patch, patch, patch)
    return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, gz * patch, gy * patch, gx * patch)


def to_hu(values: Tensor, intensity: Intensity) -> Tensor:
    """Turn normalised values back into HU, clipped to the window."""
    lo, hi = intensity.window
    return ((values * intensity.std + intensity.mean) * (hi - lo) + lo).clamp(lo, hi)


def _tokens_at(tokens_BLE: Tensor, ids_BM: Tensor) -> Tensor:
    return tokens_BLE.gather(1, ids_BM[..., None].expand(-1, -1, tokens_BLE.shape[-1]))
