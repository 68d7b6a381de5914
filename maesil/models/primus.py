"""The masked autoencoder with the encoder of Primus (arXiv 2503.01835), so that nnU-Net can go on from its weights.

The encoder is that of ``dynamic-network-architectures`` 0.4.4 (Apache-2.0): the same weights give the same tokens.
Blocks carry the library's names. Its layer norms have an epsilon of 1e-5. Positions are told twice: by learnt codes
that are added, and by rotary ones that turn queries and keys (arXiv 2104.09864). Register tokens have no place: nothing
turns them. Masks, decoder, heads and loss are those of `MaskedAutoencoder`.

Shapes: as there, with R registers and F rotary frequencies, 6 F = d.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from maesil.config.schema import ModelConfig
from maesil.models.masked_autoencoder import MaskedAutoencoder
from maesil.types import Zyx

_MLP_RATIO = 4 * 2 / 3
_LAYER_SCALE = 0.1
_SLOPE_OF_HE = 1e-2


class PrimusAutoencoder(MaskedAutoencoder):
    """`MaskedAutoencoder` whose visible patches are encoded by Primus."""

    pos_embed: Tensor
    rotary: Tensor

    def make_encoder(self, config: ModelConfig) -> None:
        """Make the parts that encode visible patches."""
        width, registers = config.width, config.registers
        self.patch_embed = nn.Linear(config.patch_voxels, width)
        self.pos_embed = nn.Parameter(torch.zeros(registers + config.tokens, width))
        self.register_tokens = nn.Parameter(torch.zeros(registers, width)) if registers else None
        self.blocks = nn.ModuleList(PrimusBlock(width, config.heads, registers) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("rotary", rotary_positions(config.grid, width // config.heads), persistent=False)

    def forward_encoder(self, patches_BNV: Tensor, ids_keep: Tensor) -> Tensor:
        """Encode the visible patches: ``[B, N, D]``."""
        tokens = self.patch_embed(patches_BNV) + self.pos_embed[self.config.registers + ids_keep]
        tokens = with_registers(tokens, self.register_tokens, self.pos_embed)
        rotary_BNF2 = self.rotary[ids_keep]
        for block in self.blocks:
            tokens = self.through(block, tokens, rotary_BNF2)
        latent_BND: Tensor = self.norm(tokens)[:, self.config.registers :]
        return latent_BND

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights anew: those of the encoder as the library does, the others as MAE does."""
        super().init_weights(generator)
        nn.init.kaiming_normal_(self.patch_embed.weight, a=_SLOPE_OF_HE, generator=generator)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6, generator=generator)
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, PrimusBlock)
            block.init_weights(number, generator)


class PrimusBlock(nn.Module):
    """A block of EVA-02 (arXiv 2303.11331): attention and a gated MLP, each normed within, scaled and added."""

    def __init__(self, width: int, heads: int, registers: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = RotaryAttention(width, heads, registers)
        self.gamma_1 = nn.Parameter(torch.full((width,), _LAYER_SCALE))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = GatedMlp(width, int(width * _MLP_RATIO))
        self.gamma_2 = nn.Parameter(torch.full((width,), _LAYER_SCALE))

    def init_weights(self, number: int, generator: torch.Generator) -> None:
        """Draw the weights of block 1, 2, ...: what it adds to its input is smaller the deeper it lies."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02, generator=generator)
        with torch.no_grad():
            for last in (self.attn.proj, self.mlp.fc2):
                last.weight.div_(math.sqrt(2.0 * number))
            for gamma in (self.gamma_1, self.gamma_2):
                gamma.fill_(_LAYER_SCALE)

    def forward(self, tokens_BND: Tensor, rotary: Tensor) -> Tensor:
        """``[B, R + N, D]`` to the same; ``rotary`` ``[B, N, F, 2]`` of the tokens after the registers."""
        mixed_BND: Tensor = tokens_BND + self.gamma_1 * self.attn(self.norm1(tokens_BND), rotary)
        out_BND: Tensor = mixed_BND + self.gamma_2 * self.mlp(self.norm2(mixed_BND))
        return out_BND


class RotaryAttention(nn.Module):
    """Multi-head self-attention whose queries and keys are turned by where their tokens lie."""

    def __init__(self, width: int, heads: int, registers: int) -> None:
        super().__init__()
        self.heads, self.registers = heads, registers
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BND: Tensor, rotary: Tensor) -> Tensor:
        """``[B, R + N, D]`` to the same, each head of width d by itself."""
        q, k, v = (
            part(tokens_BND).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (self._turned(part, rotary).to(v.dtype) for part in (q, k))
        mixed_BHNd = functional.scaled_dot_product_attention(q, k, v)
        out_BND: Tensor = self.proj(self.norm(mixed_BHNd.transpose(1, 2).flatten(2)))
        return out_BND

    def _turned(self, heads_BHNd: Tensor, rotary: Tensor) -> Tensor:
        """Turn each pair of channels by the angle of its frequency, of all tokens but the registers."""
        registers, placed = heads_BHNd[:, :, : self.registers], heads_BHNd[:, :, self.registers :]
        first, second = placed[..., ::2], placed[..., 1::2]
        sin, cos = rotary[:, None].unbind(-1)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        return torch.cat([registers, turned], dim=2) if self.registers else turned


class GatedMlp(nn.Module):
    """SwiGLU (arXiv 2002.05202) with a layer norm before its last matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """``[B, N, D]`` to the same."""
        gated = functional.silu(self.fc1_g(tokens_BND)) * self.fc1_x(tokens_BND)
        out_BND: Tensor = self.fc2(self.norm(gated))
        return out_BND


def with_registers(tokens_BND: Tensor, register_tokens: Tensor | None, pos_embed: Tensor) -> Tensor:
    """Put the register tokens ``[R, D]``, with their learnt codes, before the others: ``[B, R + N, D]``."""
    if register_tokens is None:
        return tokens_BND
    first = (register_tokens + pos_embed[: len(register_tokens)]).to(tokens_BND.dtype)
    return torch.cat([first.expand(tokens_BND.shape[0], -1, -1), tokens_BND], dim=1)


def rotary_positions(grid: Zyx, head_width: int) -> Tensor:
    """Make sine and cosine of the angles by which channels turn: ``[L, F, 2]`` for heads of width d = 2 F.

    A third of the frequencies for each of z, y, x: position p turns by p * 10000^(-i / n), i = 0 .. n - 1, n = d / 6.
    """
    count = head_width // 6
    frequencies = 10000.0 ** -(torch.arange(count, dtype=torch.float32) / count)
    index_zyx = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = torch.cat([index.reshape(-1, 1) * frequencies for index in index_zyx], dim=1)
    return torch.stack([angles.sin(), angles.cos()], dim=-1)


def codes_on_grid(pos_embed: Tensor, registers: int, trained: Zyx, grid: Zyx) -> Tensor:
    """Return learnt codes ``[R + L, D]`` on another grid: trilinear, as nnU-Net does, but for registers."""
    # A program takes any grid, so it always resizes; on the grid of training that changes nothing.
    if not torch.compiler.is_exporting() and grid == trained:
        return pos_embed
    codes_1Dzyx = pos_embed[registers:].T.reshape(1, -1, *trained)
    resized = functional.interpolate(codes_1Dzyx, size=grid, mode="trilinear", align_corners=False)
    return torch.cat([pos_embed[:registers], resized[0].flatten(1).T])
