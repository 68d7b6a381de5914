from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maesil.config.schema import MaskConfig, ModelConfig
from maesil.models.latent import LatentStatistics, correlation_loss, mean_over_crop, shuffled
from maesil.models.masked_input import MaskedInput
from maesil.models.masking import make_masks
from maesil.models.registry import make_model
from maesil.types import Intensity

SMALL = ModelConfig(crop=32, patch=8, width=48, depth=1, decoder_width=48, decoder_depth=1, channels=8, latent=32)
KINDS = ["maesil", "primus", "mae2d", "ae", "vae", "vqvae"]


def rank_of(tokens: torch.Tensor) -> float:
    statistics = LatentStatistics()
    statistics(tokens)
    return statistics.effective_rank


def random_tokens(directions: int, width: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:directions]
    return torch.randn(4, 500, directions, generator=generator) @ basis


@given(st.integers(1, 20), st.integers(0, 3), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_the_effective_rank_counts_the_directions_that_tokens_fill(directions, seed, scale):
    tokens = scale * random_tokens(directions, seed=seed) + 3.0
    assert rank_of(tokens) == pytest.approx(directions, rel=0.03)


def test_the_effective_rank_is_that_of_numpy_in_one_batch_or_in_several():
    tokens = random_tokens(9) * torch.linspace(0.1, 3, 24)
    statistics = LatentStatistics()
    for part in tokens.split(1):
        assert statistics(part) is part
    values = np.linalg.eigvalsh(np.cov(tokens.flatten(0, 1).double().numpy().T, bias=True)).clip(1e-30)
    shares = values / values.sum()
    assert statistics.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert rank_of(tokens) == pytest.approx(statistics.effective_rank)


def test_equal_tokens_fill_one_direction_and_no_tokens_none():
    assert rank_of(torch.ones(2, 5, 4)) == 1.0
    assert np.isnan(LatentStatistics().effective_rank)


def test_changes_keep_to_their_crop():
    tokens = torch.randn(3, 16, 8)
    mixed = shuffled(tokens)
    assert not torch.equal(mixed, tokens) and torch.equal(mixed, shuffled(tokens))
    torch.testing.assert_close(mixed.sort(dim=1).values, tokens.sort(dim=1).values)
    torch.testing.assert_close(mean_over_crop(tokens), tokens.mean(dim=1, keepdim=True).expand(-1, 16, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_passes_its_latent_through_the_change_and_is_itself_again_afterwards(kind):
    torch.manual_seed(0)
    model = make_model(replace(SMALL, kind=kind))
    model.init_weights(torch.Generator().manual_seed(0))
    volume = torch.randint(-1024, 1500, (2, 32, 32, 32), generator=torch.Generator().manual_seed(1)).short()
    inputs = MaskedInput(volume, make_masks(MaskConfig(), SMALL.grid, [3, 4]), Intensity(mean=0.4, std=0.3), 8)
    model(inputs)  # a codebook starts with the first batch
    model.eval()
    base, seen = model(inputs).shown, []

    def look(latent):
        seen.append(latent)
        return latent

    with torch.no_grad(), model.latent_changed(look):
        assert torch.equal(model(inputs).shown, base)
    assert len(seen) == 1 and len(seen[0]) == 2 and seen[0].ndim == 3  # tokens of two crops
    for change in (mean_over_crop, shuffled):
        with torch.no_grad(), model.latent_changed(change):
            assert not torch.allclose(model(inputs).shown, base, atol=1e-4)
    with pytest.raises(ValueError, match="on purpose"), model.latent_changed(look):
        raise ValueError("on purpose")
    assert torch.equal(model(inputs).shown, base)


def test_white_tokens_have_no_correlation_and_repeated_channels_have():
    tokens = torch.randn(8, 4000, 6, generator=torch.Generator().manual_seed(0))
    assert correlation_loss(1.1 * tokens) < 0.01
    repeated = torch.cat([tokens[..., :3], tokens[..., :3]], dim=-1)
    assert correlation_loss(1.1 * repeated) == pytest.approx(1.21**2, rel=0.05)  # 6 of 36 covariances, over 6
    assert correlation_loss(0.01 * tokens) == pytest.approx(5, rel=0.02)  # too narrow: the variance term


def test_its_gradient_spreads_tokens_over_more_directions():
    tokens = torch.nn.Parameter(random_tokens(3) + 0.1 * torch.randn(4, 500, 24, generator=torch.Generator()))
    before = rank_of(tokens)
    for _ in range(50):
        (gradient,) = torch.autograd.grad(correlation_loss(tokens), tokens)
        tokens.data -= 300 * gradient
    assert rank_of(tokens) > 2 * before
