"""A masked autoencoder of axial slices: what MAESIL argues against, with everything else equal.

Each slice of a crop is an image of its own, cut into patches; the tokens hidden in 3D hide, in each of their PZ
slices, the patch at their place. Shapes: B crops, Z slices, n = B * Z images, PZ slices and g pixels of a patch,
L tokens of the crop, l of a slice, N visible tokens of a slice, S tokens of the crop to predict, D and E widths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maesil import kernels
from maesil.config.schema import ModelConfig
from maesil.models.masked_autoencoder import Block, Encoded, Prediction, ReconstructionModel, sincos_positions
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import Masks, masks_of_equal_count
from maesil.models.patches import tokens_at


class SliceMaskedAutoencoder(ReconstructionModel):
    """The masked autoencoder of ``maesil`` in two dimensions, slice by slice, with a linear head."""

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        pixels, width, decoder_width = _pixels(config), config.width, config.decoder_width
        self.patch_embed = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.pred = nn.Linear(decoder_width, pixels)
        grid = (1, *config.grid[1:])
        self.register_buffer("pos_embed", sincos_positions(grid, width), persistent=False)
        self.register_buffer("decoder_pos_embed", sincos_positions(grid, decoder_width), persistent=False)

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        nn.init.normal_(self.mask_token, std=0.02, generator=generator)
        super().init_weights(generator)

    @property
    def latent_per_voxel(self) -> float:
        """Numbers of the latent code for each voxel, nothing being hidden."""
        return self.config.width / _pixels(self.config)

    def encode(self, inputs: MaskedInput) -> Encoded:
        """Encode the visible patches slice by slice; a crop's tokens are those of all its slices."""
        PZ, gz = self.config.patch_zyx[0], self.config.grid[0]
        masks = _for_each_slice(self._masks_of_layers(inputs.masks), PZ)
        patches = inputs.visible_patches(inputs.input_dtype(self.patch_embed.weight))
        # Visible tokens come in the order of the grid and equally many a layer: [B, gz, N, PZ, g] to [n, N, g].
        images_nNg = patches.reshape(len(patches), gz, -1, PZ, _pixels(self.config)).transpose(2, 3).flatten(0, 2)
        tokens_nND = self.patch_embed(images_nNg) + self.pos_embed[masks.ids_keep]
        for block in self.blocks:
            tokens_nND = self.through(block, tokens_nND)
        return Encoded(self.norm(tokens_nND).unflatten(0, (-1, self.config.crop_zyx[0])).flatten(1, 2))

    def decode(self, encoded: Encoded, inputs: MaskedInput) -> Prediction:
        """Predict the patches ``inputs.targets``: ``[B, S, V]``."""
        PZ, gz, slices = self.config.patch_zyx[0], self.config.grid[0], self.config.crop_zyx[0]
        masks = _for_each_slice(self._masks_of_layers(inputs.masks), PZ)
        tokens_BND = encoded.tokens_BND
        visible = self.decoder_embed(tokens_BND.reshape(len(tokens_BND) * slices, -1, tokens_BND.shape[2]))
        tokens = kernels.unshuffle_tokens(visible, self.mask_token, self.decoder_pos_embed, masks.ids_restore)
        for block in self.decoder_blocks:
            tokens = self.through(block, tokens)
        pred_nlg: Tensor = self.pred(self.decoder_norm(tokens))
        voxels = pred_nlg.reshape(-1, gz, PZ, *pred_nlg.shape[1:]).transpose(2, 3).flatten(3).flatten(1, 2)
        return Prediction(tokens_at(voxels, inputs.targets))

    def _masks_of_layers(self, masks: Masks) -> Masks:
        """Return the masks of each layer of tokens by itself, ``[B * gz, ...]``."""
        gz, visible = self.config.grid[0], masks.ids_keep.shape[1]
        hidden = masks.mask > 0 if visible < self.config.tokens else torch.zeros_like(masks.mask, dtype=torch.bool)
        # Layers hide equally many (`RunConfig` sees to it), so shapes say how many: no GPU is asked and waited for.
        return masks_of_equal_count(hidden.reshape(len(hidden) * gz, -1), (self.config.tokens - visible) // gz)


def _pixels(config: ModelConfig) -> int:
    """Return the pixels of a patch in one slice."""
    _, y, x = config.patch_zyx
    return y * x


def _for_each_slice(masks: Masks, slices: int) -> Masks:
    """Give each slice of a layer the mask of its layer."""
    parts = (masks.ids_keep, masks.ids_masked, masks.ids_restore, masks.mask)
    return Masks(*(part.repeat_interleave(slices, dim=0) for part in parts))
