"""The Triton kernels on a CPU, under Triton's interpreter; collected by `test_interpreted`, in a process of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kernel_cases import PatchSpec, check_gather, check_loss, check_unshuffle

from maesil import kernels

FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def test_this_is_the_interpreter():
    assert kernels.can_run_triton("cpu")


SPECS = st.builds(
    PatchSpec,
    batch=st.integers(1, 3),
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    patch=st.sampled_from([2, 4, 6, 8, 10, (2, 4, 8), (4, 8, 8), (8, 2, 6), (1, 3, 4)]),
    share=st.sampled_from([0.0, 0.25, 0.6, 1.0]),  # 0: one token
    margin=st.none() | st.tuples(*[st.integers(0, 9)] * 3),
    flip=st.booleans(),
    per_sample_window=st.booleans(),
    narrow=st.booleans(),
    content=st.sampled_from(["noise", "noise", "extremes", "constant"]),
    ids_dtype=st.sampled_from([torch.int64, torch.int32]),
    contiguous=st.booleans(),
    apart=st.sampled_from([0, 0, 1, 8]),
    seed=st.integers(0, 99),
)


@FEW
@given(SPECS, DTYPES)
def test_gather(spec, dtype):
    check_gather(spec, dtype=dtype)


@FEW
@given(SPECS, DTYPES, st.booleans(), st.booleans(), st.booleans())
def test_loss(spec, dtype, norm_patch, weighted, transposed):
    check_loss(spec, dtype=dtype, norm_patch=norm_patch, weighted=weighted, transposed=transposed)


@pytest.mark.parametrize("margin", [(0, 0, 0), (8, 3, 8)])
def test_patches_of_the_paper_mirrored_in_a_larger_scan(margin):
    spec = PatchSpec(patch=8, grid=(2, 2, 2), margin=margin, flip=True, per_sample_window=True, seed=3)
    check_gather(spec)
    check_loss(spec)


def test_patches_that_are_no_cubes_mirrored_in_a_larger_scan():
    spec = PatchSpec(patch=(4, 8, 2), grid=(3, 2, 4), margin=(3, 8, 5), flip=True, per_sample_window=True, seed=3)
    check_gather(spec)
    check_loss(spec, norm_patch=True)


def test_patches_larger_than_a_tile():
    spec = PatchSpec(batch=1, patch=16, grid=(1, 1, 2), share=1.0)
    check_gather(spec)
    check_loss(spec, norm_patch=True)
    check_loss(PatchSpec(batch=1, patch=14, grid=(1, 2, 1), share=1.0, flip=True, margin=(1, 1, 1)), norm_patch=True)


@FEW
@given(
    batch=st.integers(1, 3),
    sizes=st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(1, n))),
    width=st.sampled_from([1, 5, 33, 64, 96, 100, 129]),
    part=st.booleans(),
    repeats=st.booleans(),
    dtype=DTYPES,
    codes_as_tokens=st.booleans(),
    grad_layout=st.sampled_from(["contiguous", "transposed", "expanded", "strided"]),
    seed=st.integers(0, 99),
)
def test_unshuffle(batch, sizes, width, part, repeats, dtype, codes_as_tokens, grad_layout, seed):
    tokens, shown, chosen = sizes
    check_unshuffle(
        batch, tokens, shown, width, chosen if part else None, repeats, "cpu", dtype,
        dtype if codes_as_tokens else torch.float32, grad_layout, seed,
    )  # fmt: skip


def test_unshuffle_of_more_rows_than_one_program_takes():
    check_unshuffle(batch=2, tokens=300, shown=75, width=128)
    check_unshuffle(batch=2, tokens=300, shown=75, width=128, subset=140)


def test_no_weight_no_loss_no_gradient():
    pred = torch.randn(1, 2, 8, requires_grad=True)
    volume, ids = torch.zeros(1, 2, 2, 4, dtype=torch.int16), torch.tensor([[0, 1]])
    with kernels.use_kernels("triton"):
        loss = kernels.masked_reconstruction_loss(
            pred, volume, ids, patch_size=2, window=(-1.0, 1.0), mean=0.0, std=1.0, weight=torch.zeros(1, 2)
        )
        (2.0**24 * loss).backward()
    assert loss.item() == 0
    assert (pred.grad == 0).all()


def test_nothing_visible_and_nothing_hidden():
    volume, none = torch.zeros(2, 2, 2, 4, dtype=torch.int16), torch.zeros(2, 0, dtype=torch.int64)
    options = {"patch_size": 2, "window": (-1.0, 1.0), "mean": 0.0, "std": 1.0}
    with kernels.use_kernels("triton"):
        assert kernels.gather_patches(volume, none, dtype=torch.float32, **options).shape == (2, 0, 8)
        pred = torch.zeros(2, 0, 8, requires_grad=True)
        loss = kernels.masked_reconstruction_loss(pred, volume, none, **options)
        loss.backward()
    assert loss.item() == 0 and pred.grad.shape == pred.shape


@pytest.mark.parametrize("seed", range(2))
def test_twice_the_same_is_the_same_to_the_bit(seed):
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(seed)
        leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in [(2, 5, 8), (8,), (12, 8)]]
        ids_restore = torch.stack([torch.randperm(12, generator=generator) for _ in range(2)])
        volume = torch.randint(-1024, 3072, (2, 4, 4, 6), generator=generator).short()
        options = {"patch_size": 2, "window": (-900.0, 900.0), "mean": 0.1, "std": 0.3, "norm_patch": True}
        with kernels.use_kernels("triton"):
            pred = kernels.unshuffle_tokens(*leaves, ids_restore)
            loss = kernels.masked_reconstruction_loss(pred, volume, ids_restore, **options)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
