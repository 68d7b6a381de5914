"""PSNR and SSIM against MONAI and torchmetrics on the same arrays; what makes them agree stands in metrics.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from maesil.evaluation.metrics import ErrorSums
from maesil.evaluation.similarity import KINDS as KIND
from maesil.evaluation.similarity import SSIM_RADIUS, ssim, ssim_map

WINDOW = (-1000.0, 1000.0)
WIDTH = 2000.0
INNER = (slice(SSIM_RADIUS, -SSIM_RADIUS),) * 3
"""Voxels whose Gaussian window lies in the volume: the only ones at which no convention about faces plays a part."""


def smooth(seed: int) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).normal(0, 1, (21, 26, 31)), 1.5)
    return noise / noise.std() * 400


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Reference and prediction, float64 HU ``[Z, Y, X]``, both leaving the window."""
    reference = smooth(0)
    return torch.from_numpy(reference), torch.from_numpy(reference + 0.5 * smooth(1))


def in_window(volume: torch.Tensor) -> torch.Tensor:
    """HU above the lower end of the window, clipped to it: what the other libraries are given."""
    return volume.clamp(*WINDOW) - WINDOW[0]


def everywhere(volume: torch.Tensor) -> torch.Tensor:
    return torch.ones(volume.shape, dtype=torch.bool)


def test_psnr(pair):
    reference, predicted = pair
    sums = ErrorSums(WINDOW)
    sums.add(reference, predicted, everywhere(reference), everywhere(reference))
    batch = [in_window(volume)[None, None] for volume in (predicted, reference)]
    assert sums.psnr_whole == pytest.approx(float(peak_signal_noise_ratio(*batch, data_range=WIDTH)), abs=1e-4)
    from monai.metrics import PSNRMetric  # takes seconds

    assert sums.psnr_whole == pytest.approx(float(PSNRMetric(max_val=WIDTH)(*batch)), abs=1e-4)
    # torchmetrics clips by itself if it is told both ends.
    raw = [volume[None, None] for volume in (predicted, reference)]
    assert sums.psnr_whole == pytest.approx(float(peak_signal_noise_ratio(*raw, data_range=WINDOW)), abs=1e-4)


def as_images(volume: torch.Tensor, axial: bool) -> torch.Tensor:
    """``[1, 1, Z, Y, X]``, or one image a slice: ``[Z, 1, Y, X]``."""
    return in_window(volume)[:, None] if axial else in_window(volume)[None, None]


@pytest.mark.parametrize("axial", [False, True], ids=["3d", "axial"])
def test_ssim_of_torchmetrics(pair, axial):
    reference, predicted = pair
    ours = ssim_map(reference, predicted, WINDOW, axial=axial)
    _, theirs = structural_similarity_index_measure(
        as_images(predicted, axial), as_images(reference, axial), gaussian_kernel=True, sigma=1.5, data_range=WIDTH,
        k1=0.01, k2=0.03, return_full_image=True,
    )  # fmt: skip
    theirs = theirs.reshape(ours.shape)
    inner = (slice(None), *INNER[1:]) if axial else INNER
    torch.testing.assert_close(ours[inner], theirs[inner], rtol=0, atol=1e-10)
    # At the faces it mirrors without repeating the outermost voxel: another convention, another mean.
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("axial", [False, True], ids=["3d", "axial"])
def test_ssim_of_monai(pair, axial):
    reference, predicted = pair
    inner = torch.zeros(reference.shape, dtype=torch.bool)
    inner[(slice(None), *INNER[1:]) if axial else INNER] = True
    ours = ssim(reference, [predicted], WINDOW, {"inner": inner})[0][KIND[axial]]["inner"]
    from monai.metrics import SSIMMetric

    metric = SSIMMetric(
        spatial_dims=2 if axial else 3, data_range=WIDTH, win_size=11, kernel_sigma=1.5, k1=0.01, k2=0.03
    )
    # MONAI computes in float32, on windows that lie in the volume, and averages over all of those.
    theirs = metric(as_images(predicted, axial), as_images(reference, axial)).mean()
    assert ours == pytest.approx(float(theirs), abs=5e-5)


def test_all_three_agree_where_no_face_plays_a_part(pair):
    """scikit-image's own mean leaves out the same 5 voxels at the faces as MONAI does."""
    reference, predicted = pair
    mean = structural_similarity(
        in_window(reference).numpy(), in_window(predicted).numpy(), data_range=WIDTH, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert ssim_map(reference, predicted, WINDOW)[INNER].mean().item() == pytest.approx(mean, abs=1e-10)
