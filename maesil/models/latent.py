"""The latent tokens of a model under test: what they look like, and the model with other tokens in their place.

A model whose score stays as it is when its latent tokens are replaced does not use its encoder. Shapes: B samples, N
tokens of a crop, D channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from maesil.distributed import current

LatentChange = Callable[[Tensor], Tensor]
"""Takes the latent tokens of crops, ``[B, N, D]``, and returns what the decoder is given in their place."""

USED_FROM_DB = 0.5
"""An encoder whose tokens are worth less than this (dB of the score) is reported as not used."""


def mean_over_crop(latent_BND: Tensor) -> Tensor:
    """Return the mean of each crop's tokens at every place: what a token says of its own place is gone."""
    return latent_BND.mean(dim=1, keepdim=True).expand_as(latent_BND)


def shuffled(latent_BND: Tensor) -> Tensor:
    """Return each crop's tokens in another order, always the same one: they say the right things of wrong places."""
    order_N = torch.randperm(latent_BND.shape[1], generator=torch.Generator().manual_seed(0))
    return latent_BND[:, order_N.to(latent_BND.device)]


def correlation_loss(latent_BND: Tensor) -> Tensor:
    """Return how far the channels of the latent move together: a scalar, 0 where each moves by itself.

    These are two terms of VICReg (arXiv 2105.04906): the squared covariances of all pairs of channels over D, and, with
    weight 5, how far the standard deviation of each channel stays below 1, since covariances would vanish with the
    tokens. Mean and covariance are those of all ranks' crops, so that the gradient is the same however many there are.
    """
    ranks, tokens_ND = current(), latent_BND.flatten(0, 1)
    with torch.autocast(tokens_ND.device.type, enabled=False):
        tokens_ND = tokens_ND.float()
        away_ND = tokens_ND - ranks.sum(tokens_ND.detach().mean(dim=0)) / ranks.count
        own_DD = away_ND.T @ away_ND / len(away_ND)
        # The value is that of all ranks, the gradient flows through what is this rank's own.
        covariance_DD = own_DD + (ranks.sum(own_DD.detach()) / ranks.count - own_DD.detach())
        variance_D = covariance_DD.diagonal()
        together = (covariance_DD.square().sum() - variance_D.square().sum()) / len(variance_D)
        return together + 5 * functional.relu(1 - (variance_D + 1e-4).sqrt()).mean()


class LatentStatistics:
    """Adds up latent tokens, batch by batch, and tells how many directions they fill."""

    def __init__(self) -> None:
        self.count = 0
        self._sum_D: Tensor | float = 0.0
        self._products_DD: Tensor | float = 0.0

    def __call__(self, latent_BND: Tensor) -> Tensor:
        """Look at tokens and return them as they are: a `LatentChange` that changes nothing."""
        tokens_ND = latent_BND.detach().flatten(0, 1).double()
        self.count += len(tokens_ND)
        self._sum_D = self._sum_D + tokens_ND.sum(dim=0)
        self._products_DD = self._products_DD + tokens_ND.T @ tokens_ND
        return latent_BND

    @property
    def effective_rank(self) -> float:
        """The number of directions that the tokens fill evenly, or unevenly to the same effect: 1 to D; NaN for none.

        It is the exponential of the entropy of the eigenvalues of the tokens' covariance, each taken as its share of
        their sum (after Roy and Vetterli, EUSIPCO 2007, who take singular values).
        """
        if self.count < 2:
            return float("nan")
        assert isinstance(self._sum_D, Tensor) and isinstance(self._products_DD, Tensor)
        mean_D = self._sum_D / self.count
        covariance_DD = self._products_DD / self.count - torch.outer(mean_D, mean_D)
        eigenvalues = torch.linalg.eigvalsh(covariance_DD.cpu()).clamp_min(0)
        if not eigenvalues.sum() > 0:
            return 1.0  # all tokens are equal
        shares = eigenvalues / eigenvalues.sum()
        return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
