"""Cases for the kernels, and checks of Triton against the definitions in float64. Needs torch alone, on any device.

Whatever a launcher allocates is filled with NaN first, and float inputs lie between NaN: a place that is not
written, or read from beside the tensor, shows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from maesil import kernels
from maesil.kernels import reference

ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""A few times the unit roundoff; Triton's interpreter cuts bfloat16 off where a GPU rounds."""


@dataclass(frozen=True)
class Patches:
    """A batch of scans, which patches are wanted, and how they are to be looked at."""

    volume: Tensor
    ids: Tensor
    options: dict[str, object]
    weight: Tensor

    @property
    def pred_shape(self) -> tuple[int, ...]:
        return (*self.ids.shape, math.prod(reference.edges_of(self.options["patch_size"])))


@dataclass(frozen=True)
class PatchSpec:
    """What varies between cases of gather and loss."""

    batch: int = 2
    grid: tuple[int, int, int] = (2, 3, 2)
    patch: int | tuple[int, int, int] = 4
    share: float = 0.5
    """Of the tokens, those wanted."""
    margin: tuple[int, int, int] | None = None
    """Voxels of the scan beyond the superpatch along z, y, x; None: the superpatch is the volume."""
    flip: bool = False
    per_sample_window: bool = False
    narrow: bool = False
    """A window of one HU."""
    content: str = "noise"
    """noise, extremes (of int16), or constant (every patch, but for one voxel of the batch)."""
    ids_dtype: torch.dtype = torch.int64
    contiguous: bool = True
    apart: int = 0
    """Voxels between one scan of the batch and the next, in memory."""
    seed: int = 0


def make_patches(spec: PatchSpec, device: str) -> Patches:
    """Draw a case from its specification."""
    generator = torch.Generator().manual_seed(spec.seed)
    edges = tuple(n * edge for n, edge in zip(spec.grid, reference.edges_of(spec.patch), strict=True))
    shape = tuple(edge + extra for edge, extra in zip(edges, spec.margin or (0, 0, 0), strict=True))
    tokens = math.prod(spec.grid)
    ids = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(spec.batch)])
    ids = ids[:, : max(1, round(spec.share * tokens))].to(spec.ids_dtype).contiguous()
    options: dict[str, object] = {"patch_size": spec.patch, "window": (-1000.0, 900.0), "mean": 0.3, "std": 0.2}
    if spec.per_sample_window:
        lo = torch.rand(spec.batch, generator=generator) * 900 - 1000
        options["window"] = torch.stack([lo, lo + 50 + 1000 * torch.rand(spec.batch, generator=generator)], 1)
    if spec.narrow:
        options["window"] = (39.0, 40.0)
    if spec.margin is not None:
        room = torch.tensor(spec.margin) + 1
        options["origin"] = (torch.rand(spec.batch, 3, generator=generator) * room).long()
        options["size"] = edges
    if spec.flip:
        options["flip"] = torch.rand(spec.batch, 3, generator=generator) < 0.5
    weight = torch.rand(ids.shape, generator=generator) * (torch.rand(ids.shape, generator=generator) < 0.8)
    weight[0, 0] = 1.0
    volume = _hu(spec, shape, generator).to(device)
    if not spec.contiguous:
        volume = volume.transpose(1, 3).contiguous().transpose(1, 3)
    if spec.apart:
        beside = volume.new_full((spec.batch, spec.apart), 3071)
        volume = torch.cat([volume.flatten(1), beside], dim=1)[:, : -spec.apart].unflatten(1, shape)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    return Patches(volume, ids.to(device), moved, weight.to(device))


def _hu(spec: PatchSpec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if spec.content == "constant":
        volume = torch.full((spec.batch, *shape), -317, dtype=torch.int16)
        volume[0, 1, 1, 1] = 40
        return volume
    volume = torch.randint(-1100, 3072, (spec.batch, *shape), generator=generator).short()
    if spec.content == "extremes":
        extreme = torch.tensor([-32768, 32767, -1024, 3071, -1000, 900], dtype=torch.int16)
        volume = extreme[torch.randint(0, 6, volume.shape, generator=generator)]
    return volume


@contextlib.contextmanager
def triton_on_poison() -> Iterator[None]:
    """Run Triton kernels, into memory full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # among other things, fills what torch.empty returns
    try:
        with kernels.use_kernels("triton"):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def guarded(tensor: Tensor) -> Tensor:
    """Return a copy that lies between NaN."""
    beside = tensor.new_full((64,), float("nan"))
    around = torch.cat([beside, tensor.flatten(), beside])
    return around[64 : 64 + tensor.numel()].view(tensor.shape)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Draw normal numbers of a dtype, between NaN."""
    return guarded(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype))


def assert_near(found: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    """Compare with float64."""
    torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=rtol)


def check_gather(spec: PatchSpec, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Patches gathered by Triton are those of the definition."""
    case = make_patches(spec, device)
    expected = reference.gather_patches(case.volume, case.ids.long(), dtype=torch.float64, **case.options)
    with triton_on_poison():
        found = kernels.gather_patches(case.volume, case.ids, dtype=dtype, **case.options)
    assert found.dtype is dtype and found.shape == case.pred_shape
    assert_near(found, expected, atol=4 * ROUNDING[torch.float32], rtol=ROUNDING[dtype])


def check_loss(
    spec: PatchSpec,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    norm_patch: bool = False,
    eps: float = 1e-6,
    weighted: bool = True,
    transposed: bool = False,
) -> None:
    """Loss and gradient by Triton are those of the definition, and autograd of it."""
    case = make_patches(spec, device)
    pred = draw(case.pred_shape, dtype, device, seed=spec.seed + 1)
    if transposed:
        pred = pred.transpose(0, 1).contiguous().transpose(0, 1)
    options = {**case.options, "norm_patch": norm_patch, "eps": eps, "weight": case.weight if weighted else None}

    exact = pred.double().requires_grad_()
    expected = reference.masked_reconstruction_loss(exact, case.volume, case.ids.long(), **options)
    (expected_grad,) = torch.autograd.grad(3.0 * expected, exact)
    pred.requires_grad_()
    with triton_on_poison():
        found = kernels.masked_reconstruction_loss(pred, case.volume, case.ids, **options)
        (found_grad,) = torch.autograd.grad(3.0 * found, pred)

    assert found.dtype is torch.float32 and found_grad.dtype is dtype and found_grad.shape == pred.shape
    # What float32 leaves of a normalised target: its rounding, times 1 / sqrt(eps) for a constant patch.
    blur = 1e-3 if norm_patch and spec.content == "constant" else 4e-6
    assert_near(found, expected, atol=blur, rtol=1e-5)
    largest, kind = float(expected_grad.abs().max()), torch.finfo(dtype)
    finest = kind.smallest_normal * kind.eps  # gradients of many patches are subnormal in float16
    assert_near(found_grad, expected_grad, atol=blur * largest + finest, rtol=ROUNDING[dtype])
    if weighted:
        assert (found_grad[case.weight == 0] == 0).all()


def check_unshuffle(
    batch: int = 2,
    tokens: int = 7,
    shown: int = 3,
    width: int = 5,
    subset: int | None = None,
    repeats: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    exact_dtype: torch.dtype = torch.float32,
    grad_layout: str = "contiguous",
    seed: int = 0,
) -> None:
    """Tokens and all three gradients by Triton are those of the definition, and autograd of it."""
    generator = torch.Generator().manual_seed(seed)
    ids_restore = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)]).to(device)
    ids_subset = None
    if subset is not None:
        ids_subset = torch.stack([torch.randperm(tokens, generator=generator)[:subset] for _ in range(batch)])
        ids_subset = (ids_subset // 2 * 2 if repeats else ids_subset).to(device)
    leaves = [
        draw((batch, shown, width), dtype, device, seed + 1),
        draw((width,), exact_dtype, device, seed + 2),
        draw((tokens, width), exact_dtype, device, seed + 3),
    ]
    grad = _laid_out(draw((batch, tokens if subset is None else subset, width), dtype, device, seed + 4), grad_layout)

    exact = [leaf.to(dtype).double().requires_grad_() for leaf in leaves]
    expected = reference.unshuffle_tokens(*exact, ids_restore, ids_subset)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with triton_on_poison():
        found = kernels.unshuffle_tokens(*leaves, ids_restore, ids_subset)
        found_grads = torch.autograd.grad(found, leaves, grad)

    assert found.dtype is dtype
    # Three roundings, the first two of normal numbers: of the mask token, of a code, of their sum.
    assert_near(found, expected, atol=4 * ROUNDING[dtype], rtol=ROUNDING[dtype])
    many = batch * tokens  # as far as rounding may add up in a sum of them
    for by_triton, by_definition, leaf in zip(found_grads, expected_grads, leaves, strict=True):
        assert by_triton.dtype is leaf.dtype
        assert_near(
            by_triton, by_definition, atol=many * ROUNDING[torch.float32] / 4, rtol=max(1e-5, 2 * ROUNDING[leaf.dtype])
        )


def _laid_out(grad: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return grad.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return grad[:1, :1].expand_as(grad)
    if layout == "strided":
        return torch.stack([grad, grad.new_full(grad.shape, float("nan"))], dim=-1)[..., 0]
    return grad
