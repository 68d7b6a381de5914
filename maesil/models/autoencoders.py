"""The models MAESIL is compared with: 3D autoencoders with a convolutional bottleneck.

All are trained by the same trainer on the same crops, masks and loss. Convolutions see the whole crop: hidden voxels
are set to the mean (0 in normalised units), and a second channel says which ones are hidden.

Shapes: B samples, Z Y X voxels, C channels, c channels of the code, z y x its grid (one code per patch), K codebook
entries, V voxels of a patch, L tokens, S to predict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from maesil.config.schema import ModelConfig
from maesil.distributed import current
from maesil.models.masked_autoencoder import Encoded, Prediction, ReconstructionModel
from maesil.models.masked_input import MaskedInput
from maesil.models.patches import halvings, patchify, tokens_at, unpatchify, with_tokens_at
from maesil.types import Zyx


class Autoencoder(ReconstructionModel):
    """A 3D convolutional autoencoder; its code has one vector of ``latent`` numbers per patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        steps = halvings(config.patch)
        widths = [config.channels << stage for stage in range(len(steps))]
        self.encoder = nn.Sequential(*_encoder_stages(widths, steps), nn.Conv3d(widths[-1], self._code_channels(), 1))
        self.decoder = nn.Sequential(nn.Conv3d(config.latent, widths[-1], 1), *_decoder_stages(widths, steps))

    def _code_channels(self) -> int:
        return self.config.latent

    @property
    def latent_per_voxel(self) -> float:
        """Numbers of the latent code for each voxel."""
        return self.config.latent / self.config.patch_voxels

    def encode(self, inputs: MaskedInput) -> Encoded:
        """Encode the crops: a token is the code of a patch."""
        code, auxiliary_loss, facts = self.bottleneck(
            self._stages(self.encoder, self._masked_volume(inputs)), inputs.noise
        )
        return Encoded(code.flatten(2).transpose(1, 2), auxiliary_loss=auxiliary_loss, facts=facts)

    def decode(self, encoded: Encoded, inputs: MaskedInput) -> Prediction:
        """Predict the patches ``inputs.targets``: ``[B, S, V]``."""
        tokens_BcL = encoded.tokens_BND.transpose(1, 2)
        code_Bczyx = tokens_BcL.reshape(*tokens_BcL.shape[:2], *self.config.grid)
        voxels_BZYX = self._stages(self.decoder, code_Bczyx)[:, 0]
        patches_BSV = tokens_at(patchify(voxels_BZYX, self.config.patch), inputs.targets)
        return Prediction(patches_BSV, encoded.auxiliary_loss, encoded.facts)

    def _stages(self, stages: nn.Sequential, field_BCzyx: Tensor) -> Tensor:
        """Send a field through one stage after the other; residual blocks are where memory goes."""
        for stage in stages:
            field_BCzyx = self.through(stage, field_BCzyx) if isinstance(stage, ResidualBlock) else stage(field_BCzyx)
        return field_BCzyx

    def bottleneck(
        self, code_Bczyx: Tensor, noise_Bczyx: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Return the code as the decoder gets it, the auxiliary loss, and what to log."""
        return code_Bczyx, None, {}

    def _masked_volume(self, inputs: MaskedInput) -> Tensor:
        """Return the crops as convolutions see them: visible voxels, and which are hidden: ``[B, 2, Z, Y, X]``."""
        dtype = inputs.input_dtype(next(self.encoder.parameters()))
        patches_BNV = inputs.visible_patches(dtype)
        ids_keep, tokens = inputs.masks.ids_keep, self.config.tokens
        empty = patches_BNV.new_zeros(len(ids_keep), tokens, patches_BNV.shape[-1])
        seen = with_tokens_at(empty, ids_keep, patches_BNV)
        hidden = with_tokens_at(torch.ones_like(empty), ids_keep, torch.zeros_like(patches_BNV))
        grid, patch = self.config.grid, self.config.patch
        return torch.stack([unpatchify(seen, grid, patch), unpatchify(hidden, grid, patch)], dim=1)


class VariationalAutoencoder(Autoencoder):
    """A VAE (arXiv 1312.6114): the code is drawn from a normal distribution, the auxiliary loss its divergence (KL)."""

    WARMUP = 0.3
    """Share of the steps over which the weight of the KL rises from 0."""

    def _code_channels(self) -> int:
        return 2 * self.config.latent

    def auxiliary_weight(self, progress: float) -> float:
        """Return the weight of the KL when this share of the steps is done."""
        return self.config.penalty * min(1.0, progress / self.WARMUP)

    @property
    def noise_shape(self) -> tuple[int, ...] | None:
        """Shape of the normal numbers that training draws for each sample: one for each number of the code."""
        return (self.config.latent, *self.config.grid)

    def bottleneck(
        self, code_Bczyx: Tensor, noise_Bczyx: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Draw the code where there is noise to draw it with, else take its mean; KL is a mean over the code."""
        mean, log_variance = code_Bczyx.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20.0, 10.0)
        kl = 0.5 * (mean.float().square() + log_variance.float().exp() - 1 - log_variance.float()).mean()
        if noise_Bczyx is not None:
            mean = mean + noise_Bczyx.to(mean.dtype) * (0.5 * log_variance).exp()
        return mean, kl, {"kl": kl.detach()}


class VectorQuantisedAutoencoder(Autoencoder):
    """A VQ-VAE (arXiv 1711.00937): each code is replaced by the nearest of K; the codebook follows by averages.

    Codes that fall out of use are replaced by encoder outputs of the batch, and the codebook starts from such.
    """

    DECAY = 0.95
    DEAD_BELOW = 0.1
    """A code whose average count falls below this share of an even use is revived."""

    codebook_Kc: Tensor
    counts_K: Tensor
    sums_Kc: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("codebook_Kc", torch.zeros(config.codes, config.latent))
        self.register_buffer("counts_K", torch.zeros(config.codes))
        self.register_buffer("sums_Kc", torch.zeros(config.codes, config.latent))

    @property
    def latent_per_voxel(self) -> float:
        """Codes for each voxel: each is one number of log2(K) bits."""
        return 1 / self.config.patch_voxels

    def auxiliary_weight(self, progress: float) -> float:
        """Return the weight of the commitment."""
        return self.config.penalty

    def bottleneck(
        self, code_Bczyx: Tensor, noise_Bczyx: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Quantise the code, its gradient passed straight through; the auxiliary loss is the commitment."""
        code_Bczyx = code_Bczyx.float()
        code_nc = code_Bczyx.movedim(1, -1).flatten(0, -2)
        nearest_n = torch.cdist(code_nc, self.codebook_Kc).argmin(dim=1)
        if self.training:
            self._learn_codebook(code_nc.detach(), nearest_n)
            nearest_n = torch.cdist(code_nc, self.codebook_Kc).argmin(dim=1)
        chosen = self.codebook_Kc[nearest_n].reshape(code_Bczyx.movedim(1, -1).shape).movedim(-1, 1)
        commitment = functional.mse_loss(code_Bczyx, chosen)
        straight_through = code_Bczyx + (chosen - code_Bczyx).detach()
        return straight_through, commitment, {"perplexity": self._perplexity(nearest_n)}

    @torch.no_grad()
    def _learn_codebook(self, code_nc: Tensor, nearest_n: Tensor) -> None:
        """Move each code towards the average of what chose it, on any rank; revive the dead ones."""
        K = len(self.codebook_Kc)
        counts = current().sum(_counts(nearest_n, K))
        sums = current().sum(torch.zeros_like(self.sums_Kc).index_add_(0, nearest_n, code_nc))
        self.counts_K.lerp_(counts, 1 - self.DECAY)
        self.sums_Kc.lerp_(sums, 1 - self.DECAY)
        even = current().count * len(code_nc) / K
        used_K = self.counts_K > self.DEAD_BELOW * even
        # Drawn for all, taken for the dead: how many they are is known to the device alone, and asking it is waiting.
        drawn_Kc = _drawn_rows(code_nc, K)
        averages_Kc = self.sums_Kc / self.counts_K.clamp_min(torch.finfo(self.counts_K.dtype).tiny)[:, None]
        self.codebook_Kc.copy_(torch.where(used_K[:, None], averages_Kc, drawn_Kc))
        self.sums_Kc.copy_(torch.where(used_K[:, None], self.sums_Kc, drawn_Kc * even))
        self.counts_K.masked_fill_(~used_K, even)

    def _perplexity(self, nearest_n: Tensor) -> Tensor:
        """Return how many codes are in use: the exponential of the entropy of their shares."""
        counts = _counts(nearest_n, len(self.codebook_Kc))
        counts = current().sum(counts) if self.training else counts
        share = counts / counts.sum()
        return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())


def _counts(numbers_n: Tensor, K: int) -> Tensor:
    """Count how often each of 0 .. K - 1 occurs, float32 ``[K]``; `torch.bincount` waits for a GPU."""
    return numbers_n.new_zeros(K, dtype=torch.float32).index_add_(0, numbers_n, torch.ones_like(numbers_n).float())


def _drawn_rows(rows_nc: Tensor, count: int) -> Tensor:
    """Draw rows at random from those of all ranks, the same on each of them: ``[count, c]``."""
    ranks, n = current(), len(rows_nc)
    # By the device's own generator, which is alike on all ranks: numbers of the host would have to be sent and awaited.
    drawn = torch.randint(ranks.count * n, (count,), device=rows_nc.device)
    ours = (drawn // n == ranks.number)[:, None]
    return ranks.sum(torch.where(ours, rows_nc[drawn % n], 0.0))


class ResidualBlock(nn.Module):
    """Two 3^3 convolutions added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(8, channels)
        self.body = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv3d(channels, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv3d(channels, channels, 3, padding=1),
        )

    def forward(self, field_BCzyx: Tensor) -> Tensor:
        """``[B, C, z, y, x]`` to the same."""
        out_BCzyx: Tensor = field_BCzyx + self.body(field_BCzyx)
        return out_BCzyx


def _encoder_stages(widths: list[int], steps: list[Zyx]) -> list[nn.Module]:
    """Halve the edges once a stage: strided convolution, residual block."""
    stages: list[nn.Module] = []
    for before, after, step in zip([2, *widths], widths, steps, strict=False):
        stages += [nn.Conv3d(before, after, _kernel(step), stride=step, padding=1), ResidualBlock(after)]
    return [*stages, nn.SiLU()]


def _decoder_stages(widths: list[int], steps: list[Zyx]) -> list[nn.Module]:
    """Double the edges once a stage: residual block, transposed convolution (kernel 4, stride 2: no uneven overlap)."""
    stages: list[nn.Module] = []
    for before, after, step in zip(widths[::-1], [*widths[-2::-1], 0], steps[::-1], strict=True):
        doubled = nn.ConvTranspose3d(before, after or 1, _kernel(step), stride=step, padding=1)
        stages += [ResidualBlock(before), nn.SiLU(), doubled]
    return stages


def _kernel(step: Zyx) -> Zyx:
    """Return the kernel of a stage: 4 along an axis that is halved, 3 along one that stays."""
    z, y, x = (factor + 2 for factor in step)
    return z, y, x
