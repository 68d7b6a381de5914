"""The scores against scikit-image, NumPy in float64, and what must not change them."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from maesil.evaluation.metrics import BorderSums, ErrorSums, patch_rmse, psnr, region_voxels
from maesil.evaluation.similarity import KINDS as KIND
from maesil.evaluation.similarity import ssim, ssim_map
from maesil.models.patches import expand_cells, unpatchify

WINDOW = (-1000.0, 1000.0)
WIDTH = 2000.0


def smooth_noise(shape, seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 1, shape)
    for axis in range(3):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
    return noise / noise.std() * 400


@pytest.fixture
def volumes():
    """(reference int16, prediction float32), HU, odd sizes, both leaving the window."""
    shape = (25, 33, 38)
    reference = np.rint(smooth_noise(shape, 0)).astype(np.int16)
    predicted = (reference + smooth_noise(shape, 1) * 0.5).astype(np.float32)
    return torch.from_numpy(reference), torch.from_numpy(predicted)


def clipped(volume):
    return np.clip(volume.numpy().astype(np.float64), *WINDOW)


def random_mask(shape, share, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def test_error_sums_are_numpy_in_float64(volumes):
    reference, predicted = volumes
    hidden, region = random_mask(reference.shape, 0.75, 0), random_mask(reference.shape, 0.5, 1)
    sums = ErrorSums(WINDOW)
    sums.add(reference, predicted, hidden, region)
    ref, pred = clipped(reference), clipped(predicted)
    both = (hidden & region).numpy()
    pasted = np.where(hidden.numpy(), pred, ref)
    inside = region.numpy()
    assert sums.psnr_hidden == pytest.approx(10 * np.log10(WIDTH**2 / ((ref - pred)[both] ** 2).mean()), abs=1e-5)
    assert sums.psnr_whole == pytest.approx(
        peak_signal_noise_ratio(ref[inside], pred[inside], data_range=WIDTH), abs=1e-5
    )
    assert sums.psnr_pasted == pytest.approx(
        peak_signal_noise_ratio(ref[inside], pasted[inside], data_range=WIDTH), abs=1e-5
    )
    assert sums.mae_hu == pytest.approx(np.abs(ref - pred)[both].mean(), rel=1e-6)


def test_errors_pool_over_parts_of_a_volume(volumes):
    reference, predicted = volumes
    hidden, region = random_mask(reference.shape, 0.75, 0), random_mask(reference.shape, 0.5, 1)
    at_once, in_parts = ErrorSums(WINDOW), ErrorSums(WINDOW)
    at_once.add(reference, predicted, hidden, region)
    for part in (slice(0, 3), slice(3, 20), slice(20, None)):
        in_parts.add(reference[part], predicted[part], hidden[part], region[part])
    assert in_parts.psnr_hidden == pytest.approx(at_once.psnr_hidden, abs=1e-9)
    assert in_parts.voxels == at_once.voxels and in_parts.mae_hu == pytest.approx(at_once.mae_hu)


def test_psnr_of_nothing_and_of_perfection():
    assert math.isnan(psnr(0.0, 0, WINDOW))
    assert psnr(0.0, 10, WINDOW) == math.inf
    assert psnr(10 * 200.0**2, 10, WINDOW) == pytest.approx(20.0)


@pytest.mark.parametrize("axial", [False, True])
def test_ssim_map_is_scikit_images(volumes, axial):
    reference, predicted = volumes
    ours = ssim_map(reference.double(), predicted.double(), WINDOW, axial=axial).numpy()
    options = {
        "data_range": WIDTH,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "K1": 0.01,
        "K2": 0.03,
        "full": True,
    }
    # SSIM's luminance term needs intensities from 0 on.
    ref, pred = clipped(reference) - WINDOW[0], clipped(predicted) - WINDOW[0]
    if axial:
        theirs = np.stack([structural_similarity(r, p, **options)[1] for r, p in zip(ref, pred, strict=True)])
    else:
        theirs = structural_similarity(ref, pred, **options)[1]
    np.testing.assert_allclose(ours, theirs, atol=1e-11)

    region = random_mask(reference.shape, 0.3, 2)
    score = ssim(reference, [predicted], WINDOW, {"region": region})[0][KIND[axial]]["region"]
    assert score == pytest.approx(theirs[region.numpy()].mean(), abs=2e-6)


def test_ssim_of_a_volume_thinner_than_its_window():
    volume = torch.from_numpy(smooth_noise((3, 12, 12), 0))
    # scikit-image allows no window larger than the volume; one slice repeated is a case both can do.
    thick = volume[:1].expand(21, -1, -1).contiguous()
    expected = ssim_map(thick, thick + 50, WINDOW)[10]
    torch.testing.assert_close(ssim_map(volume[:1], volume[:1] + 50, WINDOW)[0], expected)


@pytest.mark.parametrize("axial", [False, True])
def test_voxels_outside_the_scan_change_no_score(volumes, axial):
    reference, predicted = volumes
    valid = torch.zeros(reference.shape, dtype=torch.bool)
    valid[2:20, 5:30, 8:] = True
    hidden, region = random_mask(reference.shape, 0.75, 0), valid & random_mask(reference.shape, 0.5, 1)
    noise = torch.from_numpy(smooth_noise(reference.shape, 9))

    def scores(reference, predicted):
        errors, borders = ErrorSums(WINDOW), BorderSums(patch=8, crop=16, window=WINDOW)
        errors.add(reference, predicted, hidden, region)
        borders.add(reference, predicted, hidden & valid)
        similarity = ssim(reference, [predicted], WINDOW, {"r": region}, valid_ZYX=valid)[0][KIND[axial]]["r"]
        return (
            errors.psnr_hidden,
            errors.psnr_whole,
            errors.mae_hu,
            borders.ratio,
            borders.seam_ratio,
            similarity,
        )

    noisy = scores(torch.where(valid, reference, noise), torch.where(valid, predicted, -noise))
    assert noisy == pytest.approx(scores(reference.double(), predicted.double()), rel=1e-9)


def test_regions_come_from_the_maps():
    valid_cells = torch.tensor([[[255, 254, 255, 255]]], dtype=torch.uint8)
    body_cells = torch.tensor([[[128, 255, 127, 255]]], dtype=torch.uint8)
    regions = region_voxels(valid_cells, body_cells, (5, 8, 27))
    counts = {name: region.sum(dim=(0, 1)).tolist() for name, region in regions.items()}
    assert counts["whole"] == [40] * 8 + [0] * 8 + [40] * 11
    assert counts["body"] == [40] * 8 + [0] * 16 + [40] * 3


def test_patch_rmse_of_known_errors():
    reference = torch.zeros(8, 16, 20)
    predicted = torch.full_like(reference, 7.0)
    predicted[:, :8, :8] = 3.0
    hidden = torch.ones(reference.shape, dtype=torch.bool)
    hidden[:, 8:, :8] = False
    region = torch.ones_like(hidden)
    region[:, 8:, 8:13] = False  # 3 of 8 columns left: less than half
    found = patch_rmse(reference, predicted, hidden, region, WINDOW, patch=8)
    # The last patches are cut to 4 of 8 columns by the volume: just half.
    assert sorted(found.tolist()) == pytest.approx([3.0, 7.0, 7.0, 7.0])


def grid_of_steps(shape, patch, crop, step, seam):
    """A ramp of slope 1 along each axis with a jump of ``step`` at patch borders and ``seam`` at crop borders."""
    total = torch.zeros(shape, dtype=torch.float64)
    for axis, size in enumerate(shape):
        after = torch.arange(1, size)
        jumps = torch.where(after % crop == 0, float(seam), torch.where(after % patch == 0, float(step), 1.0))
        ramp = torch.cat([torch.zeros(1, dtype=torch.float64), jumps.double().cumsum(0)])
        total += ramp.view([-1 if i == axis else 1 for i in range(3)])
    return total


def test_border_ratio_of_a_known_grid():
    shape = (32, 32, 32)
    everywhere = torch.ones(shape, dtype=torch.bool)
    reference, stepped = grid_of_steps(shape, 8, 16, 1, 1), grid_of_steps(shape, 8, 16, 3, 5)
    borders = BorderSums(patch=8, crop=16, window=WINDOW)
    borders.add(reference, stepped, everywhere)
    assert borders.ratio == pytest.approx(3.0) and borders.seam_ratio == pytest.approx(5.0)

    same = BorderSums(patch=8, crop=16, window=WINDOW)
    same.add(stepped, stepped, everywhere)
    assert same.ratio == pytest.approx(1.0) and same.seam_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("axis", range(3))
def test_borders_and_seams_lie_where_patches_and_crops_of_three_edges_end(axis):
    patch, crop, shape = (4, 8, 2), (8, 24, 12), (16, 48, 24)
    number, view = torch.arange(shape[axis]), [1, 1, 1]
    view[axis] = -1
    steps = (number // patch[axis] * 50 + number // crop[axis] * 100).float().view(view).expand(shape)
    borders = BorderSums(patch=patch, crop=crop, window=(-1000.0, 3000.0))
    borders.add(torch.zeros(shape), steps, torch.ones(shape, dtype=torch.bool))
    area = math.prod(shape) / shape[axis]
    ends, cuts = shape[axis] // patch[axis] - 1, shape[axis] // crop[axis] - 1
    assert borders.sums[0].tolist() == [0.0, area * 50 * (ends - cuts), area * 150 * cuts]


def test_patch_rmse_of_patches_of_three_edges():
    patch, shape = (4, 8, 2), (8, 16, 6)
    reference = torch.zeros(shape)
    levels = torch.arange(1.0, 13.0)
    predicted = unpatchify(levels[None, :, None].expand(1, 12, 64), (2, 2, 3), patch)[0]
    everything = torch.ones(shape, dtype=torch.bool)
    found = patch_rmse(reference, predicted, everything, everything, WINDOW, patch=patch)
    assert torch.allclose(found, levels.double())


def test_border_ratio_needs_both_sides():
    shape = (16, 16, 16)
    reference, stepped = grid_of_steps(shape, 8, 16, 1, 1), grid_of_steps(shape, 8, 16, 3, 5)
    checkered = expand_cells(torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]).view(2, 2, 2).bool(), 8)
    borders = BorderSums(patch=8, crop=16, window=WINDOW)
    borders.add(reference, stepped, checkered)
    # No two of these patches share a face: nothing across a border is counted.
    assert math.isnan(borders.ratio)


def test_a_flat_prediction_has_no_border_ratio():
    borders = BorderSums(patch=8, crop=16, window=WINDOW)
    borders.add(
        grid_of_steps((16,) * 3, 8, 16, 1, 1),
        torch.zeros(16, 16, 16),
        torch.ones(16, 16, 16, dtype=torch.bool),
    )
    assert math.isnan(borders.ratio)
