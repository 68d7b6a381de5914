"""The Triton kernels on a GPU: `make gpu` runs this, with torch, triton, numpy and pytest alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.kernel_cases import PatchSpec, check_gather, check_loss, check_unshuffle, draw, make_patches

from maesil import kernels
from maesil.kernels import reference

GPU = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAPER = PatchSpec(batch=2, grid=(16, 16, 16), patch=8, share=0.25, flip=True)
"""128^3 voxels in patches of 8^3, a quarter visible."""
SPECS = [
    PAPER,
    PatchSpec(batch=3, grid=(4, 5, 6), patch=8, share=0.75, margin=(16, 8, 24), flip=True, per_sample_window=True),
    PatchSpec(batch=3, grid=(4, 5, 6), patch=8, margin=(3, 1, 5), flip=True, content="extremes", seed=1),
    PatchSpec(batch=2, grid=(3, 3, 3), patch=8, content="constant", ids_dtype=torch.int32),
    PatchSpec(batch=2, grid=(3, 4, 5), patch=6, share=1.0, flip=True, per_sample_window=True, contiguous=False),
    PatchSpec(batch=1, grid=(2, 3, 2), patch=32, share=1.0, flip=True),
    *[PatchSpec(batch=5, grid=(7, 3, 5), patch=p, share=0.3, flip=True, seed=p) for p in (2, 4, 10, 12, 16)],
]


def test_there_is_a_gpu():
    assert torch.cuda.is_available(), "expected a CUDA GPU, torch sees none"


@pytest.mark.parametrize(("spec", "dtype"), list(itertools.product(SPECS, DTYPES)))
def test_gather(spec, dtype):
    check_gather(spec, GPU, dtype)


@pytest.mark.parametrize(("spec", "dtype", "norm"), list(itertools.product(SPECS, DTYPES, [False, True])))
def test_loss(spec, dtype, norm):
    check_loss(spec, GPU, dtype, norm_patch=norm, weighted=spec.seed % 2 == 0, transposed=norm)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "strided"])
@pytest.mark.parametrize("subset", [None, 700])
@pytest.mark.parametrize(("width", "dtype"), list(itertools.product([1, 33, 192, 384, 512, 1000], DTYPES)))
def test_unshuffle(width, dtype, subset, layout):
    check_unshuffle(3, 1331, 333, width, subset, False, GPU, dtype, grad_layout=layout, seed=width)


def test_unshuffle_with_repeats():
    check_unshuffle(2, 900, 300, 64, 400, True, GPU)


def step(case, leaves, ids_restore):
    """From voxels to gradients, through all three operations."""
    embed, mask_token, codes, head = leaves
    shown = ids_restore.shape[1] // 4
    ids = ids_restore.argsort(dim=1)
    visible = kernels.gather_patches(case.volume, ids[:, :shown], dtype=torch.bfloat16, **case.options) @ embed
    tokens = kernels.unshuffle_tokens(visible, mask_token, codes, ids_restore) @ head
    hidden = ids[:, shown:]
    pred = tokens.gather(1, hidden[..., None].expand(-1, -1, head.shape[1]))
    return kernels.masked_reconstruction_loss(pred, case.volume, hidden, weight=hidden.float(), **case.options)


@pytest.fixture(scope="module")
def full_size():
    case = make_patches(PAPER, GPU)
    generator = torch.Generator().manual_seed(0)
    ids_restore = torch.stack([torch.randperm(4096, generator=generator) for _ in range(2)]).to(GPU)
    leaves = [draw(shape, torch.bfloat16, GPU, i) / 8 for i, shape in enumerate([(512, 384), (384,), (4096, 384)])]
    leaves.append(draw((384, 512), torch.bfloat16, GPU, 9) / 8)
    return case, [leaf.requires_grad_() for leaf in leaves], ids_restore


def test_ten_runs_are_equal_to_the_bit(full_size):
    case, leaves, ids_restore = full_size
    results = []
    for _ in range(10):
        loss = step(case, leaves, ids_restore)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_compiled_whole_it_computes_the_same(full_size):
    case, leaves, ids_restore = full_size
    eager = step(case, leaves, ids_restore)
    compiled = torch.compile(step, fullgraph=True)(case, leaves, ids_restore)
    torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=0)
    grads = zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True)
    for a, b in grads:
        torch.testing.assert_close(a.float(), b.float(), rtol=5e-2, atol=5e-2 * float(b.abs().max()))


def test_nothing_waits_for_the_gpu(full_size):
    case, leaves, ids_restore = full_size
    step(case, leaves, ids_restore).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, leaves, ids_restore).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_means_triton_here_and_the_definition_for_float64():
    case = make_patches(SPECS[1], GPU)
    with kernels.use_kernels("auto"):
        auto = kernels.gather_patches(case.volume, case.ids, dtype=torch.float32, **case.options)
        exact = kernels.gather_patches(case.volume, case.ids, dtype=torch.float64, **case.options)
    with kernels.use_kernels("triton"):
        assert torch.equal(auto, kernels.gather_patches(case.volume, case.ids, dtype=torch.float32, **case.options))
    assert torch.equal(exact, reference.gather_patches(case.volume, case.ids, dtype=torch.float64, **case.options))


MANY = 1025
"""Samples of 128^3 voxels, or of 4,096 tokens of 512, with more than 2^31 elements together."""


@pytest.fixture
def empty_memory():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    yield
    torch.cuda.empty_cache()


OPTIONS = {"patch_size": 8, "window": (-1000.0, 900.0), "mean": 0.3, "std": 0.2}


def test_volumes_and_predictions_of_more_than_2_31_elements(empty_memory):
    volume = torch.empty(MANY, 128, 128, 128, dtype=torch.int16, device=GPU).random_(-1024, 3072)
    assert volume.numel() > 2**31
    ids = torch.arange(4096, device=GPU).expand(MANY, -1)
    last = {"volume_BZYX": volume[-2:], **OPTIONS}
    patches = kernels.gather_patches(volume, ids, dtype=torch.bfloat16, **OPTIONS)
    assert patches.numel() > 2**31
    expected = reference.gather_patches(ids_BN=ids[-2:], dtype=torch.float64, **last)
    torch.testing.assert_close(patches[-2:].double(), expected, rtol=2**-7, atol=1e-6)

    pred = patches.zero_().requires_grad_()
    loss = kernels.masked_reconstruction_loss(pred, volume, ids, **OPTIONS)
    (grad,) = torch.autograd.grad(loss, pred)
    share = reference.masked_reconstruction_loss_backward(
        torch.ones((), device=GPU, dtype=torch.float64), pred[-2:].double(), ids_masked_BM=ids[-2:], **last
    )
    assert 0.5 < float(loss) / float(expected.square().mean()) < 2
    torch.testing.assert_close(grad[-2:].double() * (MANY / 2), share, rtol=2**-7, atol=1e-12)


def test_tokens_of_more_than_2_31_elements(empty_memory):
    ids_restore = torch.arange(4096, device=GPU).roll(5).expand(MANY, -1).contiguous()
    visible = torch.randn(MANY, 64, 512, device=GPU, dtype=torch.bfloat16)
    mask, codes = torch.randn(512, device=GPU), torch.randn(4096, 512, device=GPU)
    tokens = kernels.unshuffle_tokens(visible, mask, codes, ids_restore)
    assert tokens.numel() > 2**31
    expected = reference.unshuffle_tokens(visible[-2:], mask, codes, ids_restore[-2:])
    torch.testing.assert_close(tokens[-2:], expected, rtol=2**-7, atol=2**-7)
    grad_visible, grad_mask = torch.ops.maesil.unshuffle_tokens_backward(tokens, ids_restore, None, 64)
    assert torch.equal(
        grad_visible[-2:], tokens[-2:].gather(1, ids_restore[-2:].argsort(1)[:, :64, None].expand(-1, -1, 512))
    )
    seen = (ids_restore[0] < 64)[None, :, None]
    exact = sum(part.double().masked_fill(seen, 0).sum((0, 1)) for part in tokens.split(25))
    torch.testing.assert_close(grad_mask.double(), exact, rtol=1e-3, atol=1.0)
