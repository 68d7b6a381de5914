"""The definitions against plain loops in numpy float64, which share no code and no indexing with them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from maesil import kernels

WINDOW, MEAN, STD = (-1000.0, 1000.0), 0.3, 0.2


def loop_patches(volume, ids, patch, size, origin=None, flip=None, window=WINDOW):
    """Cut, mirror, then walk the grid voxel by voxel: [B, N, V] float64; a patch is one edge, or three."""
    batch, tokens = ids.shape
    pz, py, px = patch if isinstance(patch, tuple) else (patch,) * 3
    out = np.empty((batch, tokens, pz * py * px))
    for b in range(batch):
        start = (0, 0, 0) if origin is None else origin[b]
        box = volume[b][tuple(slice(int(s), int(s) + n) for s, n in zip(start, size, strict=True))]
        if flip is not None:
            box = np.flip(box, [axis for axis in range(3) if flip[b][axis]])
        lo, hi = window if isinstance(window, tuple) else (float(w) for w in window[b])
        corners = list(itertools.product(*(range(0, n, step) for n, step in zip(size, (pz, py, px), strict=True))))
        for n in range(tokens):
            z, y, x = corners[int(ids[b, n])]
            hu = box[z : z + pz, y : y + py, x : x + px].astype(np.float64).reshape(-1)
            out[b, n] = ((np.clip(hu, lo, hi) - lo) / (hi - lo) - MEAN) / STD
    return out


def random_case(seed, shape=(8, 12, 16), size=(8, 8, 12), patch=4, keep=5, batch=3):
    rng = np.random.default_rng(seed)
    volume = rng.integers(-1024, 3072, (batch, *shape)).astype(np.int16)
    tokens = int(np.prod(np.array(size) // patch))
    ids = np.stack([rng.permutation(tokens)[:keep] for _ in range(batch)])
    origin = np.stack([rng.integers(0, np.array(shape) - size + 1) for _ in range(batch)])
    flip = rng.integers(0, 2, (batch, 3)).astype(bool)
    window = np.stack([rng.uniform(-900, -100, batch), rng.uniform(100, 900, batch)], axis=1)
    return volume, ids, origin, flip, window


@pytest.mark.parametrize("patch", [(2, 4, 8), (4, 8, 2), (8, 2, 4)])
def test_patches_that_are_no_cubes_are_those_of_the_loop(patch):
    shape, size = (20, 18, 30), (16, 16, 24)
    volume, ids, origin, flip, windows = random_case(5, shape, size, patch)
    options = {
        "patch_size": patch, "window": torch.from_numpy(windows), "mean": MEAN, "std": STD, "size": size,
        "origin": torch.from_numpy(origin), "flip": torch.from_numpy(flip),
    }  # fmt: skip
    found = kernels.gather_patches(torch.from_numpy(volume), torch.from_numpy(ids), dtype=torch.float64, **options)
    expected = loop_patches(volume, ids, patch, size, origin, flip, windows)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    loss = kernels.masked_reconstruction_loss(found + 0.5, torch.from_numpy(volume), torch.from_numpy(ids), **options)
    assert loss.item() == pytest.approx(0.25)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("per_sample_window", [False, True])
def test_gather_equals_the_loop_over_crops_flips_and_windows(seed, per_sample_window):
    volume, ids, origin, flip, windows = random_case(seed)
    window = windows if per_sample_window else WINDOW
    found = kernels.gather_patches(
        torch.from_numpy(volume),
        torch.from_numpy(ids),
        patch_size=4,
        window=torch.from_numpy(windows) if per_sample_window else WINDOW,
        mean=MEAN,
        std=STD,
        dtype=torch.float64,
        origin=torch.from_numpy(origin),
        flip=torch.from_numpy(flip),
        size=(8, 8, 12),
    )
    expected = loop_patches(volume, ids, 4, (8, 8, 12), origin, flip, window)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_gather_of_a_whole_volume_in_other_dtypes(dtype, tolerance):
    volume, _, _, _, _ = random_case(0)
    ids = torch.arange(24).expand(3, -1)
    found = kernels.gather_patches(
        torch.from_numpy(volume), ids, patch_size=4, window=WINDOW, mean=MEAN, std=STD, dtype=dtype
    )
    assert found.dtype is dtype
    expected = loop_patches(volume, ids.numpy(), 4, (8, 12, 16))
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=tolerance)


def test_a_scan_that_all_samples_share_is_looked_up_where_it_lies():
    scan = torch.from_numpy(random_case(3)[0])[0]
    shared, copied = scan.expand(3, -1, -1, -1), scan.repeat(3, 1, 1, 1)
    assert kernels.reference.samples_in_place(shared).data_ptr() == scan.data_ptr()
    origin = torch.tensor([[0, 0, 0], [0, 4, 1], [0, 1, 4]])
    found, expected = (
        kernels.gather_patches(
            volume, torch.tensor([[0, 5, 2]] * 3), patch_size=4, window=WINDOW, mean=MEAN, std=STD,
            dtype=torch.float32, origin=origin, size=(8, 8, 12),
        )
        for volume in (shared, copied)
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_one_edge_as_size_means_a_cube():
    volume = torch.from_numpy(random_case(1)[0])
    ids = torch.tensor([[0, 7]] * 3)
    common = {"patch_size": 4, "window": WINDOW, "mean": 0.0, "std": 1.0, "dtype": torch.float64}
    origin = torch.zeros(3, 3, dtype=torch.int64)
    cube = kernels.gather_patches(volume, ids, size=8, origin=origin, **common)
    assert torch.equal(cube, kernels.gather_patches(volume, ids, size=(8, 8, 8), origin=origin, **common))


def loop_unshuffle(visible, mask_token, pos_embed, ids_restore):
    batch, shown, _ = visible.shape
    out = np.empty((batch, *pos_embed.shape))
    for b, position in itertools.product(range(batch), range(len(pos_embed))):
        source = ids_restore[b, position]
        out[b, position] = (visible[b, source] if source < shown else mask_token) + pos_embed[position]
    return out


def test_unshuffle_equals_the_loop_whole_and_as_a_subset():
    rng = np.random.default_rng(3)
    visible, mask_token, pos_embed = rng.normal(size=(2, 3, 5)), rng.normal(size=5), rng.normal(size=(7, 5))
    ids_restore = np.stack([rng.permutation(7) for _ in range(2)])
    expected = loop_unshuffle(visible, mask_token, pos_embed, ids_restore)
    tensors = [torch.from_numpy(value) for value in (visible, mask_token, pos_embed, ids_restore)]
    np.testing.assert_array_equal(kernels.unshuffle_tokens(*tensors).numpy(), expected)
    subset = torch.tensor([[6, 0, 3], [1, 1, 5]])
    found = kernels.unshuffle_tokens(*tensors, subset).numpy()
    np.testing.assert_array_equal(found, np.stack([expected[b, subset[b]] for b in range(2)]))


def test_unshuffle_keeps_the_dtype_of_the_visible_tokens_and_passes_gradcheck():
    ids_restore = torch.tensor([[2, 0, 3, 1], [0, 3, 1, 2]])
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 2, 3), (3,), (4, 3)]]
    assert torch.autograd.gradcheck(lambda *args: kernels.unshuffle_tokens(*args, ids_restore), leaves)
    visible = leaves[0].detach().to(torch.bfloat16)
    found = kernels.unshuffle_tokens(visible, leaves[1].float(), leaves[2].float(), ids_restore)
    assert found.dtype is torch.bfloat16


def loop_loss(pred, target, weight, norm_patch=False, eps=1e-6):
    total, weights = 0.0, 0.0
    for b, m in itertools.product(range(pred.shape[0]), range(pred.shape[1])):
        truth = target[b, m]
        if norm_patch:
            truth = (truth - truth.mean()) / np.sqrt(truth.var(ddof=1) + eps)
        total += weight[b, m] * np.mean((pred[b, m] - truth) ** 2)
        weights += weight[b, m]
    return total / weights


@pytest.mark.parametrize("norm_patch", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_the_loop(seed, norm_patch):
    volume, ids, origin, flip, _ = random_case(seed)
    rng = np.random.default_rng(seed)
    pred, weight = rng.normal(size=(*ids.shape, 64)), rng.uniform(size=ids.shape)
    found = kernels.masked_reconstruction_loss(
        torch.from_numpy(pred),
        torch.from_numpy(volume),
        torch.from_numpy(ids),
        patch_size=4,
        window=WINDOW,
        mean=MEAN,
        std=STD,
        norm_patch=norm_patch,
        weight=torch.from_numpy(weight),
        origin=torch.from_numpy(origin),
        flip=torch.from_numpy(flip),
        size=(8, 8, 12),
    )
    target = loop_patches(volume, ids, 4, (8, 8, 12), origin, flip)
    assert found.item() == pytest.approx(loop_loss(pred, target, weight, norm_patch), rel=1e-12)


def loss_setup(dtype=torch.float64):
    volume, ids, origin, flip, _ = (torch.from_numpy(value) for value in random_case(5))
    common = {"patch_size": 4, "window": WINDOW, "mean": MEAN, "std": STD}
    common |= {"origin": origin, "flip": flip, "size": (8, 8, 12)}
    pred = torch.randn(*ids.shape, 64, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return pred, volume, ids, common


def test_gather_and_loss_see_the_same_voxels():
    _, volume, ids, common = loss_setup()
    pred = kernels.gather_patches(volume, ids, dtype=torch.float64, **common)
    assert kernels.masked_reconstruction_loss(pred, volume, ids, **common).item() == 0.0
    other = {**common, "flip": ~common["flip"]}
    assert kernels.masked_reconstruction_loss(pred, volume, ids, **other).item() > 0.1


def test_loss_passes_gradcheck_and_zero_weight_means_zero_gradient():
    pred, volume, ids, common = loss_setup()
    weight = torch.rand(ids.shape, dtype=torch.float64)
    weight[1, 2] = 0
    pred = pred[..., :].requires_grad_()
    loss = lambda p: kernels.masked_reconstruction_loss(p, volume, ids, weight=weight, **common)  # noqa: E731
    assert torch.autograd.gradcheck(loss, pred)
    (gradient,) = torch.autograd.grad(loss(pred), pred)
    assert (gradient[1, 2] == 0).all()
    assert (gradient[1, 1] != 0).all()


def test_loss_is_float32_for_bfloat16_and_zero_where_nothing_weighs():
    pred, volume, ids, common = loss_setup(torch.float32)
    low = kernels.masked_reconstruction_loss(pred.bfloat16(), volume, ids, **common)
    assert low.dtype is torch.float32
    assert low.item() == pytest.approx(kernels.masked_reconstruction_loss(pred, volume, ids, **common).item(), rel=1e-2)
    pred.requires_grad_()
    nothing = kernels.masked_reconstruction_loss(pred, volume, ids, weight=torch.zeros(ids.shape), **common)
    nothing.backward()
    assert nothing.item() == 0.0
    assert (pred.grad == 0).all()


def test_shapes_that_do_not_fit_are_refused():
    pred, volume, ids, common = loss_setup()
    with pytest.raises(ValueError, match="divisible by the patch edge"):
        kernels.gather_patches(volume, ids, dtype=torch.float32, **{**common, "size": (8, 8, 10)})
    with pytest.raises(ValueError, match="leave volume"):
        kernels.gather_patches(
            volume,
            ids,
            dtype=torch.float32,
            **{**common, "origin": common["origin"] + torch.tensor([5, 0, 0])},
        )
    with pytest.raises(ValueError, match="flip must be"):
        kernels.gather_patches(volume, ids, dtype=torch.float32, **{**common, "flip": common["flip"][:1]})
    with pytest.raises(ValueError, match="pred must be"):
        kernels.masked_reconstruction_loss(pred[:, :, 1:], volume, ids, **common)
    with pytest.raises(ValueError, match="weight must be"):
        kernels.masked_reconstruction_loss(pred, volume, ids, weight=torch.ones(3), **common)
    with pytest.raises(ValueError, match="mask_token must be"):
        kernels.unshuffle_tokens(pred, torch.zeros(3), torch.zeros(4, 64), ids)
