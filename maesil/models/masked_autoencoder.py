"""The 3D masked autoencoder, its parts named as in facebookresearch/mae ``models_mae.py`` (arXiv 2111.06377).

Shapes: B samples, V voxels of a patch, L tokens of the grid, N visible, S to predict (all hidden
ones or some), D width (encoder), E width (decoder), H heads, d width of a head. Only `maesil.kernels` reads the int16
volume: no float volume and no targets are built here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maesil import kernels
from maesil.config.schema import ModelConfig
from maesil.models.faces import Known
from maesil.models.heads import make_head
from maesil.models.latent import LatentChange, correlation_loss
from maesil.models.masked_input import MaskedInput
from maesil.models.patches import tokens_at
from maesil.models.picture_head import PictureHead
from maesil.types import Zyx


@dataclass(frozen=True)
class Prediction:
    """What a model makes of a `MaskedInput`."""

    patches_BSV: Tensor
    """The predicted patches ``inputs.targets``, in normalised units: what the model learns by."""
    auxiliary_loss: Tensor | None = None
    """What a model wants added to the loss (scalar), times its `ReconstructionModel.auxiliary_weight`."""
    facts: dict[str, Tensor] = field(default_factory=dict)
    """Scalars worth logging."""
    pictured_BSV: Tensor | None = None
    """The same patches of some crops (`MaskedInput.pictured`) as a picture head draws them."""

    @property
    def shown(self) -> Tensor:
        """What people see and scores are taken of: the pictures where there are some."""
        return self.patches_BSV if self.pictured_BSV is None else self.pictured_BSV


@dataclass(frozen=True)
class Encoded:
    """What a model knows of a `MaskedInput` once it is encoded."""

    tokens_BND: Tensor
    """The latent tokens."""
    visible_BNV: Tensor | None = None
    """The visible patches, normalised, where the decoder looks at them too."""
    auxiliary_loss: Tensor | None = None
    facts: dict[str, Tensor] = field(default_factory=dict)


class ReconstructionModel(nn.Module, ABC):
    """What trainer and evaluation ask of every model: predict the patches that are hidden from it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Whether training keeps the inputs of blocks alone, and computes what is inside them anew on the way back."""
        self._latent_change: LatentChange | None = None

    def forward(self, inputs: MaskedInput) -> Prediction:
        """Predict the patches ``inputs.targets``; the latent tokens go through `latent` on their way."""
        encoded = self.encode(inputs)
        return self.decode(replace(encoded, tokens_BND=self.latent(encoded.tokens_BND)), inputs)

    @abstractmethod
    def encode(self, inputs: MaskedInput) -> Encoded:
        """Encode what is visible. The tokens to predict are not asked for, so that several `decode` can follow."""

    @abstractmethod
    def decode(self, encoded: Encoded, inputs: MaskedInput) -> Prediction:
        """Predict the patches ``inputs.targets`` from these latent tokens: ``[B, S, V]``."""

    @contextmanager
    def latent_changed(self, change: LatentChange) -> Iterator[None]:
        """Give the decoder other latent tokens than the encoder made, or look at them, while the context lasts."""
        self._latent_change = change
        try:
            yield
        finally:
            self._latent_change = None

    def latent(self, tokens_BND: Tensor) -> Tensor:
        """Return the latent tokens of crops as the decoder is to get them, see `latent_changed`."""
        return tokens_BND if self._latent_change is None else self._latent_change(tokens_BND)

    def through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Send tokens or fields through a block of the model, see `activation_checkpointing`: the same to the bit."""
        if not (self.activation_checkpointing and self.training and torch.is_grad_enabled()):
            return block(*inputs)  # type: ignore[no-any-return]
        # Blocks draw no random numbers, so there is no state of a generator to bring back.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def predict_all(self, inputs: MaskedInput, *, pictured: bool = True) -> Tensor:
        """Predict every patch, visible ones too, ``[B, L, V]``; of a masked model no loss ever taught those.

        ``pictured``: as a picture head draws them, if the model has one; else as the tokens alone say.
        """
        prediction: Prediction = self(replace(inputs, ids_target=self.all_tokens(inputs)))
        return prediction.shown if pictured else prediction.patches_BSV

    def all_tokens(self, inputs: MaskedInput) -> Tensor:
        """Return the numbers of all tokens of each crop, ``[B, L]``."""
        return torch.arange(self.config.tokens, device=inputs.device).expand(inputs.samples, -1)

    def auxiliary_weight(self, progress: float) -> float:
        """Return the weight of the auxiliary loss when this share (0..1) of the steps is done."""
        return 0.0

    @property
    def trained_beside(self) -> nn.Module | None:
        """A part that learns from a model without changing it; its gradients are clipped by themselves."""
        return None

    @property
    @abstractmethod
    def latent_per_voxel(self) -> float:
        """Numbers of the latent code for each voxel, nothing being hidden."""

    @property
    def noise_shape(self) -> tuple[int, ...] | None:
        """Shape of the normal numbers that training draws for each sample (``MaskedInput.noise``), if it draws any."""
        return None

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights anew, as MAE does: Xavier for matrices, normal for tokens, zeros for biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d | nn.ConvTranspose3d):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.reset_parameters()


class MaskedAutoencoder(ReconstructionModel):
    """Encode the visible patches, decode the grid or a part of it, predict the voxels of the hidden ones."""

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width, decoder_width = config.width, config.decoder_width
        self.make_encoder(config)

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(decoder_width))
        decoder_block = CrossBlock if config.decoder == "cross" else Block
        self.decoder_blocks = nn.ModuleList(
            decoder_block(decoder_width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.head = make_head(config)
        self.picture_head = PictureHead(config) if config.picture_head == "refine" else None

        # Fixed, and made again from the configuration: not part of the checkpoint.
        self.register_buffer("decoder_pos_embed", sincos_positions(config.grid, decoder_width), persistent=False)

    def make_encoder(self, config: ModelConfig) -> None:
        """Make the parts that encode visible patches."""
        self.patch_embed = nn.Linear(config.patch_voxels, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.register_buffer("pos_embed", sincos_positions(config.grid, config.width), persistent=False)

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        nn.init.normal_(self.mask_token, std=0.02, generator=generator)
        super().init_weights(generator)
        if self.picture_head is not None:
            self.picture_head.start_small()

    @property
    def latent_per_voxel(self) -> float:
        """Numbers of the latent code for each voxel, nothing being hidden."""
        return self.config.width / self.config.patch_voxels

    def auxiliary_weight(self, progress: float) -> float:
        """Return the weight of the loss that keeps the channels of the latent apart."""
        return self.config.decorrelation

    def encode(self, inputs: MaskedInput) -> Encoded:
        """Encode the visible patches; while it learns, channels that move together cost something."""
        patches_BNV = inputs.visible_patches(inputs.input_dtype(self.patch_embed.weight))
        latent_BND = self.forward_encoder(patches_BNV, inputs.masks.ids_keep)
        learning = self.training and self.config.decorrelation > 0
        return Encoded(latent_BND, patches_BNV, correlation_loss(latent_BND) if learning else None)

    def decode(self, encoded: Encoded, inputs: MaskedInput) -> Prediction:
        """Predict the patches ``inputs.targets``: ``[B, S, V]``."""
        masks, patches_BNV = inputs.masks, encoded.visible_BNV
        assert patches_BNV is not None
        decoded = self.forward_decoder(encoded.tokens_BND, inputs)
        known = Known(patches_BNV, masks.ids_keep, masks.mask.gather(1, masks.ids_keep) == 0)
        draft_BSV = self.head(decoded, inputs.targets, known)
        pictured_BSV = self._pictures(decoded, draft_BSV, inputs, known)
        return Prediction(draft_BSV, encoded.auxiliary_loss, pictured_BSV=pictured_BSV)

    @property
    def trained_beside(self) -> nn.Module | None:
        """The picture head."""
        return self.picture_head

    def _pictures(self, decoded: Tensor, draft_BSV: Tensor, inputs: MaskedInput, known: Known) -> Tensor | None:
        """Draw the predicted patches of the crops that are to be pictured."""
        some = inputs.pictured
        if self.picture_head is None or some is None:
            return None
        if self.head.needs_all_tokens:
            decoded = tokens_at(decoded, inputs.targets)
        known = Known(known.patches_BNV[some], known.ids_BN[some], known.usable_BN[some])
        pictured_BSV: Tensor = self.picture_head(decoded[some], draft_BSV[some], inputs.targets[some], known)
        return pictured_BSV

    def forward_encoder(self, patches_BNV: Tensor, ids_keep: Tensor) -> Tensor:
        """Encode the visible patches: ``[B, N, D]``."""
        tokens_BND: Tensor = self.patch_embed(patches_BNV) + self.pos_embed[ids_keep]
        for block in self.blocks:
            tokens_BND = self.through(block, tokens_BND)
        latent_BND: Tensor = self.norm(tokens_BND)
        return latent_BND

    def forward_decoder(self, latent_BND: Tensor, inputs: MaskedInput) -> Tensor:
        """Decode the tokens that the head asks for: all, ``[B, L, E]``, or the targets, ``[B, S, E]``."""
        visible_BNE, ids_keep, targets = self.decoder_embed(latent_BND), inputs.masks.ids_keep, inputs.targets
        if self.config.decoder == "cross":
            memory_BNE = self._on_grid(visible_BNE, inputs, ids_keep)
            tokens = self._on_grid(visible_BNE, inputs, targets)
            for block in self.decoder_blocks:
                tokens = self.through(block, tokens, memory_BNE)
            return self.decoder_norm(tokens)  # type: ignore[no-any-return]

        count = targets.shape[1]
        partial = self.config.decoder == "subset" and ids_keep.shape[1] + count < self.config.tokens
        tokens = self._on_grid(visible_BNE, inputs, torch.cat([ids_keep, targets], dim=1) if partial else None)
        for block in self.decoder_blocks:
            tokens = self.through(block, tokens)
        decoded: Tensor = self.decoder_norm(tokens)
        if partial:
            return decoded[:, -count:]
        return decoded if self.head.needs_all_tokens else tokens_at(decoded, targets)

    def _on_grid(self, visible_BNE: Tensor, inputs: MaskedInput, ids_BS: Tensor | None) -> Tensor:
        """Return tokens of the grid (these, or all): visible ones, mask tokens elsewhere, and their positions."""
        return kernels.unshuffle_tokens(
            visible_BNE, self.mask_token, self.decoder_pos_embed, inputs.masks.ids_restore, ids_BS
        )


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


class CrossBlock(nn.Module):
    """A block whose tokens look at the visible ones and never at each other (CrossMAE, arXiv 2401.14391)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm_memory = nn.LayerNorm(width, eps=1e-6)
        self.attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens_BSE: Tensor, memory_BNE: Tensor) -> Tensor:
        """``[B, S, E]`` and ``[B, N, E]`` to ``[B, S, E]``."""
        mixed_BSE: Tensor = tokens_BSE + self.attn(self.norm1(tokens_BSE), self.norm_memory(memory_BNE))
        out_BSE: Tensor = mixed_BSE + self.mlp(self.norm2(mixed_BSE))
        return out_BSE


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


class CrossAttention(nn.Module):
    """Multi-head attention from one set of tokens to another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BSE: Tensor, memory_BNE: Tensor) -> Tensor:
        """``[B, S, E]`` and ``[B, N, E]`` to ``[B, S, E]``, each head of width d by itself."""
        query_BHSd = self.q(tokens_BSE).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key_value_2BHNd = self.kv(memory_BNE).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BHSd = functional.scaled_dot_product_attention(query_BHSd, *key_value_2BHNd.unbind(0))
        out_BSE: Tensor = self.proj(mixed_BHSd.transpose(1, 2).flatten(2))
        return out_BSE


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
