"""The naive baselines against analytic fields and a direct sparse solve."""

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import sparse
from scipy.sparse.linalg import spsolve

from maesil.config.schema import MaskConfig
from maesil.evaluation.naive import (
    ITERATIONS,
    InterpolationBaseline,
    MeanBaseline,
    _prolong,
    _restrict,
    _Weights,
    spline_in_tension,
)
from maesil.models.masking import make_masks, masks_from_hidden
from maesil.models.patches import expand_cells

pytestmark = pytest.mark.usefixtures("one_thread")

SCANS = sorted(Path(os.environ.get("MAESIL_TEST_DATA", "no such folder")).glob("nifti/qin_*.nii.gz"))[:4]
WINDOW = (-1000.0, 1000.0)


def random_patches(grid, hidden, seed=0, batch=1):
    """bool [B, *grid]: True at exactly ``hidden`` patches of each sample."""
    generator = torch.Generator().manual_seed(seed)
    tokens = int(np.prod(grid))
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    return (order < hidden).view(batch, *grid)


def coordinates(edge):
    axis = torch.arange(edge, dtype=torch.float64)
    return torch.meshgrid(axis, axis, axis, indexing="ij")


@pytest.mark.parametrize("field", ["linear", "x*y", "x*y*z"])
def test_fields_without_curvature_are_reproduced_inside_the_box(field):
    z, y, x = coordinates(40)
    truth = {"linear": 3 * z - 2 * y + x + 5, "x*y": 0.1 * x * y - z, "x*y*z": 0.01 * x * y * z}[field][None]
    hidden = torch.zeros(1, 5, 5, 5, dtype=torch.bool)
    hidden[:, 1:4, 1:4, 1:4] = random_patches((3, 3, 3), 20)
    known = ~expand_cells(hidden, 8)
    filled = spline_in_tension(torch.where(known, truth, 1e6), known, iterations=120)
    assert torch.equal(filled[known], truth[known])
    assert (filled - truth).abs().max() < 1e-6 * (truth.max() - truth.min())


@pytest.mark.parametrize("patch", [3, 4, 8])
def test_solution_equals_a_direct_sparse_solve(patch):
    edge = 4 * patch if patch < 8 else 16
    hidden = random_patches((edge // patch,) * 3, int(0.75 * (edge // patch) ** 3), seed=patch)
    known = ~expand_cells(hidden, patch)
    values = torch.randn(1, edge, edge, edge, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tension = 0.1
    filled = spline_in_tension(values, known, coarsest=patch, tension=tension, iterations=200)

    chain = sparse.diags([[1.0] + [2.0] * (edge - 2) + [1.0], [-1.0] * (edge - 1), [-1.0] * (edge - 1)], [0, 1, -1])
    one = sparse.identity(edge)
    laplacian = sum(
        sparse.kron(sparse.kron(a, b), c) for a, b, c in ((chain, one, one), (one, chain, one), (one, one, chain))
    )
    energy = (tension * laplacian + laplacian @ laplacian).tocsr()
    free = ~known.flatten().numpy()
    expected = values.flatten().numpy().copy()
    expected[free] = spsolve(energy[free][:, free].tocsc(), -energy[free][:, ~free] @ expected[~free])
    np.testing.assert_allclose(filled.flatten().numpy(), expected, atol=1e-7)


def test_default_iterations_have_converged_for_ct_like_fields():
    z, y, x = coordinates(64)
    tube = 1000 * torch.sigmoid((10 - torch.hypot(y - 30, x - 25 - 0.2 * z)) / 2) + 20 * torch.sin(z * y / 40)
    known = ~expand_cells(random_patches((8, 8, 8), 384), 8)
    quick = spline_in_tension(tube.float()[None], known)
    settled = spline_in_tension(tube[None], known, iterations=200)
    error, settled_error = (float((filled - tube).square().mean().sqrt()) for filled in (quick, settled))
    assert error == pytest.approx(settled_error, rel=0.02)  # 0.2 dB


@pytest.mark.slow
@pytest.mark.skipif(not SCANS, reason="MAESIL_TEST_DATA names no folder with scans")
def test_more_iterations_move_the_score_by_what_the_page_says():
    errors = torch.zeros(len(SCANS), 2, dtype=torch.float64)
    for number, path in enumerate(SCANS):
        hu = torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32))
        starts = [(n - 64) // 2 for n in hu.shape]
        crop = hu[tuple(slice(start, start + 64) for start in starts)].clamp(*WINDOW)[None]
        hidden = make_masks(MaskConfig(kind="dual"), (8, 8, 8), [number]).mask.view(1, 8, 8, 8) > 0
        hidden_voxels = expand_cells(hidden, 8)
        for column, iterations in enumerate((ITERATIONS, 150)):
            filled = spline_in_tension(crop, ~hidden_voxels, iterations=iterations).clamp(*WINDOW)
            errors[number, column] = (filled - crop)[hidden_voxels].double().square().mean()
    moved = 10 * torch.log10(errors[:, 0] / errors[:, 1])
    together = 10 * torch.log10(errors[:, 0].sum() / errors[:, 1].sum())
    assert moved.abs().max() < 0.15 and abs(together) < 0.05, (moved, together)


@pytest.mark.parametrize(("z", "y"), [(8, 6), (40, 6), (40, 36)])
def test_restriction_is_the_transpose_of_prolongation(z, y):
    generator = torch.Generator().manual_seed(0)
    # Larger boxes along z and y are halved and doubled in another way than smaller ones.
    fine = torch.randn(2, 40, 36, 10, generator=generator, dtype=torch.float64)[:, :z, :y].contiguous()
    coarse = torch.randn(2, 20, 18, 5, generator=generator, dtype=torch.float64)[:, : z // 2, : y // 2].contiguous()
    weights = _Weights(fine)
    torch.testing.assert_close((_restrict(fine, weights) * coarse).sum(), (fine * _prolong(coarse, weights)).sum())
    expected = torch.nn.functional.interpolate(coarse[:, None], scale_factor=2, mode="trilinear")[:, 0]
    torch.testing.assert_close(_prolong(coarse, weights), expected)


def batch_of_two():
    hu = torch.randint(-1500, 1500, (2, 32, 32, 32), generator=torch.Generator().manual_seed(3)).to(torch.int16)
    hidden = random_patches((4, 4, 4), 48, seed=5, batch=2)
    valid = torch.ones(2, 32, 32, 32, dtype=torch.bool)
    valid[:, :, 20:] = False
    return hu, masks_from_hidden(hidden.flatten(1)), valid, expand_cells(hidden, 8)


def test_the_mean_baseline_is_the_mean_of_the_visible_valid_voxels():
    hu, masks, valid, hidden = batch_of_two()
    predicted = MeanBaseline(WINDOW, patch=8).predict_hu(hu, masks, valid)
    assert predicted.shape == hu.shape and predicted.dtype == torch.float32
    for sample in range(2):
        expected = hu[sample].double().clamp(*WINDOW)[valid[sample] & ~hidden[sample]].mean()
        torch.testing.assert_close(predicted[sample].double(), expected.expand(32, 32, 32), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("baseline", [MeanBaseline, InterpolationBaseline])
def test_naive_baselines_see_neither_hidden_nor_invalid_voxels(baseline):
    hu, masks, valid, hidden = batch_of_two()
    noise = torch.randint(-3000, 3000, hu.shape, generator=torch.Generator().manual_seed(4)).to(torch.int16)
    predictor = baseline(WINDOW, patch=8)
    expected = predictor.predict_hu(hu, masks, valid)
    assert torch.equal(predictor.predict_hu(torch.where(hidden | ~valid, noise, hu), masks, valid), expected)


def test_interpolation_keeps_visible_voxels_and_the_window():
    hu, masks, valid, hidden = batch_of_two()
    predicted = InterpolationBaseline(WINDOW, patch=8).predict_hu(hu, masks, valid)
    known = valid & ~hidden
    assert torch.equal(predicted[known], hu.float().clamp(*WINDOW)[known])
    assert predicted.min() >= WINDOW[0] and predicted.max() <= WINDOW[1]


@pytest.mark.parametrize("baseline", [MeanBaseline, InterpolationBaseline])
def test_a_crop_without_a_visible_valid_voxel_gets_air(baseline):
    hu, masks, valid, _ = batch_of_two()
    predicted = baseline(WINDOW, patch=8).predict_hu(hu, masks, torch.zeros_like(valid))
    assert torch.equal(predicted, torch.full(hu.shape, -1000.0))
