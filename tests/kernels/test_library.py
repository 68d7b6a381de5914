"""The operators on a CPU: dispatch, shapes for compilers, gradients against autograd of the definitions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from maesil import kernels
from maesil.kernels import library, reference

COMMON = {"patch_size": 2, "window": (-1000.0, 900.0), "mean": 0.3, "std": 0.2}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def lookup_case():
    """Two scans, a superpatch of 4 x 4 x 6 in each, five of its twelve tokens."""
    generator = torch.Generator().manual_seed(0)
    volume = torch.randint(-1024, 3072, (2, 6, 4, 8), generator=generator).short()
    ids = torch.tensor([[0, 3, 5, 7, 11], [2, 4, 6, 8, 10]])
    origin = torch.tensor([[2, 0, 1], [0, 0, 2]])
    flip = torch.tensor([[True, False, True], [False, True, False]])
    return volume, ids, {**COMMON, "origin": origin, "flip": flip, "size": (4, 4, 6)}


IDS_RESTORE = torch.tensor([[2, 0, 3, 1, 4], [0, 4, 3, 1, 2]])
SUBSET = torch.tensor([[3, 0, 2], [1, 1, 4]])


def operator_calls(dtype=torch.float32):
    """Each operator with arguments that use all it has."""
    volume, ids, options = lookup_case()
    windows = torch.tensor([[-900.0, 500.0], [-100.0, 400.0]])
    lookup = ((2, 2, 2), (4, 4, 6), (0.0, 1.0), windows, 0.3, 0.2)
    placed = (options["origin"], options["flip"])
    pred, weight = draw(2, 5, 8, dtype=dtype), torch.rand(2, 5)
    visible, mask, codes = draw(2, 2, 3, dtype=dtype), draw(3, dtype=dtype), draw(5, 3, dtype=dtype)
    grad = draw(2, 5, 3, dtype=dtype).detach()
    loss = (pred, volume, ids, *lookup, True, 1e-6, weight, *placed)
    return {
        "gather_patches": (volume, ids, *lookup, dtype, *placed),
        "unshuffle_tokens": (visible, mask, codes, IDS_RESTORE, None),
        "unshuffle_tokens of a subset": (visible, mask, codes, IDS_RESTORE, SUBSET),
        "unshuffle_tokens_backward": (grad, IDS_RESTORE, None, 2),
        "unshuffle_positions_backward": (grad[:, :3], SUBSET, 5),
        "masked_reconstruction_loss": loss,
        "masked_reconstruction_loss_backward": (torch.ones(()), pred.detach(), *loss[1:]),
    }


@pytest.mark.parametrize("call", operator_calls())
def test_operators_pass_opcheck(call):
    operator = getattr(torch.ops.maesil, call.split()[0]).default
    results = torch.library.opcheck(operator, operator_calls()[call])
    assert set(results.values()) == {"SUCCESS"}


def unshuffle_gradients(function, leaves, grad, *ids):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(function(*leaves, *ids), leaves, grad)


@pytest.mark.parametrize("subset", [None, torch.tensor([[3, 0, 2], [4, 1, 0]])])
def test_gradients_of_unshuffle_are_those_of_autograd_to_the_bit(subset):
    leaves = [draw(2, 2, 7, seed=1), draw(7, seed=2), draw(5, 7, seed=3)]
    grad = draw(2, 5 if subset is None else 3, 7, seed=4).detach()
    found = unshuffle_gradients(kernels.unshuffle_tokens, leaves, grad, IDS_RESTORE, subset)
    expected = unshuffle_gradients(reference.unshuffle_tokens, leaves, grad, IDS_RESTORE, subset)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("norm_patch", [False, True])
def test_gradient_of_the_loss_is_that_of_autograd_to_the_bit(norm_patch, weighted):
    volume, ids, options = lookup_case()
    options |= {"norm_patch": norm_patch, "weight": torch.rand(2, 5) if weighted else None}
    results = []
    for module in (kernels, reference):
        pred = draw(2, 5, 8)
        loss = module.masked_reconstruction_loss(pred, volume, ids, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, pred)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("subset", [None, SUBSET])
def test_unshuffle_passes_gradcheck(subset):
    leaves = [draw(2, 2, 3, dtype=torch.float64), draw(3, dtype=torch.float64), draw(5, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *args: kernels.unshuffle_tokens(*args, IDS_RESTORE, subset), leaves)


@pytest.mark.parametrize("norm_patch", [False, True])
def test_loss_passes_gradcheck(norm_patch):
    volume, ids, options = lookup_case()
    options |= {"weight": torch.tensor([[0.0, 1, 2, 3, 4]] * 2), "norm_patch": norm_patch}
    loss = lambda pred: kernels.masked_reconstruction_loss(pred, volume, ids, **options)  # noqa: E731
    assert torch.autograd.gradcheck(loss, draw(2, 5, 8, dtype=torch.float64))


def test_only_what_is_asked_for_gets_a_gradient():
    visible, mask, codes = draw(2, 2, 3), draw(3).detach(), draw(5, 3)
    kernels.unshuffle_tokens(visible, mask, codes, IDS_RESTORE).sum().backward()
    assert visible.grad is not None and codes.grad is not None and mask.grad is None


def test_weights_that_sum_to_zero_give_zero_gradients_even_for_scaled_losses():
    volume, ids, options = lookup_case()
    pred = draw(2, 5, 8)
    (2.0**24 * kernels.masked_reconstruction_loss(pred, volume, ids, weight=torch.zeros(2, 5), **options)).backward()
    assert torch.equal(pred.grad, torch.zeros_like(pred))


def pipeline(volume, ids, leaves, options):
    """Everything from voxels to the loss, with a product between, so that a compiler has something of its own."""
    embed, mask, codes = leaves
    tokens = kernels.gather_patches(volume, ids[:, :2], dtype=torch.float32, **options) @ embed
    tokens = kernels.unshuffle_tokens(tokens, mask, codes, IDS_RESTORE).tanh()
    return kernels.masked_reconstruction_loss(tokens, volume, ids, weight=ids.float(), **options)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_it_computes_the_same(backend):
    volume, ids, options = lookup_case()
    compiled = torch.compile(pipeline, fullgraph=True, backend=backend)
    results = []
    for function in (pipeline, compiled):
        leaves = [draw(8, 8, seed=1), draw(8, seed=2), draw(5, 8, seed=3)]
        loss = function(volume, ids, leaves, options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def chosen():
    """The choice as it is, restored after the test."""
    with kernels.use_kernels("auto"):
        yield lambda: library._choice


def test_use_kernels_is_a_function_and_a_context_manager(chosen):
    kernels.use_kernels("reference")
    assert chosen() == "reference"
    with kernels.use_kernels("triton"):
        assert chosen() == "triton"
        with pytest.raises(KeyError), kernels.use_kernels("auto"):
            raise KeyError
        assert chosen() == "triton"
    assert chosen() == "reference"
    with pytest.raises(ValueError, match="expected one of auto, reference, triton"):
        kernels.use_kernels("cuda")
    assert chosen() == "reference"


def test_triton_on_a_cpu_is_refused_outside_its_interpreter(chosen):
    volume, ids, options = lookup_case()
    assert not kernels.can_run_triton("cpu")
    with kernels.use_kernels("triton"), pytest.raises(RuntimeError, match="need CUDA tensors, found one on cpu"):
        kernels.gather_patches(volume, ids, dtype=torch.float32, **options)
    with kernels.use_kernels("triton"), pytest.raises(ValueError, match="float64"):
        kernels.gather_patches(volume, ids, dtype=torch.float64, **options)


def test_values_that_lead_out_of_the_superpatch_are_refused_on_a_cpu():
    volume, ids, options = lookup_case()
    with pytest.raises(ValueError, match=r"ids must be 0\.\.11, found 0\.\.12"):
        kernels.gather_patches(volume, ids.clamp(max=10) + (ids == 11) * 2, dtype=torch.float32, **options)
    with pytest.raises(ValueError, match="leave volume"):
        kernels.masked_reconstruction_loss(
            draw(2, 5, 8), volume, ids, **{**options, "origin": options["origin"] + torch.tensor([0, 1, 0])}
        )


def test_ids_may_be_int32():
    volume, ids, options = lookup_case()
    found = kernels.gather_patches(volume, ids.int(), dtype=torch.float32, **options)
    assert torch.equal(found, kernels.gather_patches(volume, ids, dtype=torch.float32, **options))
    leaves = draw(2, 2, 3), draw(3), draw(5, 3)
    found = kernels.unshuffle_tokens(*leaves, IDS_RESTORE.int(), SUBSET.int())
    assert torch.equal(found, kernels.unshuffle_tokens(*leaves, IDS_RESTORE, SUBSET))


def test_importing_the_kernels_needs_torch_alone():
    code = "import sys; import maesil.kernels; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    foreign = {"zarr", "numcodecs", "pyarrow", "pydicom", "SimpleITK", "dask", "typer", "rich", "triton"}
    assert foreign.isdisjoint(loaded)
    assert {name for name in loaded if name.startswith("maesil.")} == {
        "maesil.kernels", "maesil.kernels.library", "maesil.kernels.reference",
    }  # fmt: skip


def test_without_triton_the_definitions_run_and_doctor_says_so():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from maesil import kernels
from maesil.doctor import examine
from maesil.models.registry import make_model
volume, ids = torch.zeros(1, 8, 8, 8, dtype=torch.int16), torch.zeros(1, 1, dtype=torch.int64)
lookup = dict(patch_size=8, window=(-1000.0, 1000.0), mean=0.0, std=1.0)
print(kernels.gather_patches(volume, ids, dtype=torch.float32, **lookup).unique().tolist())
print(*[line.value for line in examine() if line.name == "train.kernels=auto"])
with kernels.use_kernels("triton"):
    try:
        kernels.gather_patches(volume, ids, dtype=torch.float32, **lookup)
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    voxels, runs, refused = done.stdout.splitlines()
    assert voxels == "[0.5]" and runs.startswith("reference, plain PyTorch")
    assert refused.startswith("Triton is not installed: pip install 'maesil[gpu]'")
