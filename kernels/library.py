"""The operations as PyTorch operators, and the one place that decides whether the definition or Triton runs them.

Operators of `torch.library` keep ``torch.compile`` whole: a compiler sees shapes, gradients and no inside. They take
their arguments by position and no tuples, so the readable signatures are those of `maesil.kernels`, and what is
called here by several names there: ``patch`` and ``edges`` are ``[z, y, x]`` in voxels, ``window`` is ``[lo, hi]``
unless ``windows [B, 2]`` gives one per sample.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from maesil.kernels import reference

CHOICES = ("auto", "reference", "triton")
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_choice = "auto"


class _Choice(AbstractContextManager[None]):
    """Goes back to the choice before it when left."""

    def __init__(self, before: str) -> None:
        self._before = before

    def __exit__(self, *_: object) -> None:
        global _choice
        _choice = self._before


def use_kernels(kernels: str) -> AbstractContextManager[None]:
    """Choose what runs the operations from now on, or as a context manager until it is left.

    ``auto`` (the default): Triton for CUDA tensors, the definition elsewhere and for float64. ``reference``: the
    definition everywhere. ``triton``: Triton or an error; on a CPU only under its interpreter, that is with
    ``TRITON_INTERPRET=1`` set before Triton is first imported. The choice holds for the whole process, since
    gradients are computed on other threads. Raises ValueError for another word.
    """
    global _choice
    if kernels not in CHOICES:
        raise ValueError(f"kernels={kernels!r}: expected one of {', '.join(CHOICES)}")
    before, _choice = _choice, kernels
    return _Choice(before)


def can_run_triton(device: torch.device | str) -> bool:
    """Return whether Triton kernels run on tensors of this device: CUDA, or a CPU under Triton's interpreter."""
    return not what_triton_lacks(device)


def what_triton_lacks(device: torch.device | str) -> str:
    """Say what is missing for Triton kernels to run on tensors of this device; an empty string: nothing.

    On a GPU Triton builds its launchers with a C compiler, when a kernel first runs.
    """
    if importlib.util.find_spec("triton") is None:
        return "no Triton (pip install 'maesil[gpu]')"
    kind = torch.device(device).type
    if kind == "cuda":
        return "" if _c_compiler() else "no C compiler (apt-get install gcc, or set CC)"
    return "" if kind == "cpu" and _interpreted() else "no GPU"


@functools.cache
def _c_compiler() -> str | None:
    """Find what Triton would find (``triton.runtime.build``)."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _runs_triton(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Decide for one call: Triton (True) or the definition."""
    if _choice == "reference":
        return False
    if _choice == "auto":
        return tensor.is_cuda and dtype in _TRITON_DTYPES and can_run_triton(tensor.device)
    if dtype not in _TRITON_DTYPES:
        raise ValueError(f"Triton kernels compute in float32, asked for is {dtype}; use_kernels('auto') takes it")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed: pip install 'maesil[gpu]', or use_kernels('auto')")
    if not can_run_triton(tensor.device):
        raise RuntimeError(
            f"Triton kernels need CUDA tensors, found one on {tensor.device}; use_kernels('auto'), or set "
            "TRITON_INTERPRET=1 before Python starts to interpret them on a CPU"
        )
    return True


def _run(operation: str, tensor: Tensor, dtype: torch.dtype, /, *args: Any, **options: Any) -> Any:
    """Run an operation by whichever is decided, on the tensor's own GPU."""
    function = _launcher(operation) if _runs_triton(tensor, dtype) else getattr(reference, operation)
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        return function(*args, **options)


def _launcher(operation: str) -> Any:
    """Find the Triton launcher of an operation; imported when first used, as not all systems have Triton."""
    from maesil.kernels import gather, loss, unshuffle

    (module,) = (module for module in (gather, loss, unshuffle) if hasattr(module, operation))
    return getattr(module, operation)


def _lookup(
    volume: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    edges: Sequence[int],
    window: Sequence[float],
    windows: Tensor | None,
    mean: float,
    std: float,
    origin: Tensor | None,
    flip: Tensor | None,
) -> dict[str, Any]:
    """Name the arguments by which voxels are looked up, after a look at their values where that is free: on a CPU."""
    if volume.device.type == "cpu":
        _require_inside(volume, ids, patch, edges, origin)
    bounds = (window[0], window[1]) if windows is None else windows
    return {
        "patch_size": tuple(patch), "size": tuple(edges), "window": bounds, "mean": mean, "std": std,
        "origin": origin, "flip": flip,
    }  # fmt: skip


def _require_inside(
    volume: Tensor, ids: Tensor, patch: Sequence[int], edges: Sequence[int], origin: Tensor | None
) -> None:
    start = torch.zeros(1, 3, dtype=torch.int64) if origin is None else origin
    stop = start + torch.tensor(edges)
    if (start < 0).any() or (stop > torch.tensor(volume.shape[1:])).any():
        raise ValueError(f"superpatches {tuple(edges)} at {start.tolist()} leave volume {list(volume.shape)}")
    tokens = math.prod(edge // of_patch for edge, of_patch in zip(edges, patch, strict=True))
    if ids.numel() and (ids.min() < 0 or ids.max() >= tokens):
        raise ValueError(f"ids must be 0..{tokens - 1}, found {int(ids.min())}..{int(ids.max())}")


def at_once(tensor: Tensor) -> bool:
    """Return whether an operation on this tensor may run without its operator: nobody compiles or differentiates it.

    PyTorch loads its compiler, some seconds of work, the first time that any operator of ours is called.
    """
    watched = torch.compiler.is_compiling() or torch.is_grad_enabled()
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not watched


def gather_patches_at_once(
    volume: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    edges: Sequence[int],
    window: Sequence[float],
    windows: Tensor | None,
    mean: float,
    std: float,
    dtype: torch.dtype,
    origin: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    """``maesil::gather_patches``, see `maesil.kernels.gather_patches`; voxels are data and get no gradient."""
    lookup = _lookup(volume, ids, patch, edges, window, windows, mean, std, origin, flip)
    patches: Tensor = _run("gather_patches", volume, dtype, volume, ids, dtype=dtype, **lookup)
    return patches


gather_patches = torch.library.custom_op("maesil::gather_patches", mutates_args=())(gather_patches_at_once)


@gather_patches.register_fake
def _(
    volume: Tensor, ids: Tensor, patch: Sequence[int], edges: object, window: object, windows: object, mean: float,
    std: float, dtype: torch.dtype, origin: object, flip: object,
) -> Tensor:  # fmt: skip
    return volume.new_empty((*ids.shape, math.prod(patch)), dtype=dtype)


def unshuffle_tokens_at_once(
    visible: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, ids_subset: Tensor | None
) -> Tensor:
    """``maesil::unshuffle_tokens``, see `maesil.kernels.unshuffle_tokens`."""
    tokens: Tensor = _run(
        "unshuffle_tokens", visible, visible.dtype, visible, mask_token, pos_embed, ids_restore, ids_subset
    )
    return tokens


unshuffle_tokens = torch.library.custom_op("maesil::unshuffle_tokens", mutates_args=())(unshuffle_tokens_at_once)


@unshuffle_tokens.register_fake
def _(visible: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, ids_subset: Tensor | None) -> Tensor:
    positions = ids_restore if ids_subset is None else ids_subset
    return visible.new_empty((*positions.shape, visible.shape[-1]))


@torch.library.custom_op("maesil::unshuffle_tokens_backward", mutates_args=())
def unshuffle_tokens_backward(
    grad: Tensor, ids_restore: Tensor, ids_subset: Tensor | None, visible: int
) -> tuple[Tensor, Tensor]:
    """Gradients by the ``visible`` tokens, ``[B, N, D]``, and by the mask token, ``[D]`` in float32 or better."""
    grads: tuple[Tensor, Tensor] = _run(
        "unshuffle_tokens_backward", grad, grad.dtype, grad, ids_restore, ids_subset, visible
    )
    return grads


@unshuffle_tokens_backward.register_fake
def _(grad: Tensor, ids_restore: Tensor, ids_subset: Tensor | None, visible: int) -> tuple[Tensor, Tensor]:
    batch, _, width = grad.shape
    exact = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty((batch, visible, width)), grad.new_empty((width,), dtype=exact)


@torch.library.custom_op("maesil::unshuffle_positions_backward", mutates_args=())
def unshuffle_positions_backward(grad: Tensor, ids_subset: Tensor | None, tokens: int) -> Tensor:
    """Gradient by the position codes of all ``tokens``, ``[L, D]`` in float32 or better."""
    codes: Tensor = _run("unshuffle_positions_backward", grad, grad.dtype, grad, ids_subset, tokens)
    return codes


@unshuffle_positions_backward.register_fake
def _(grad: Tensor, ids_subset: Tensor | None, tokens: int) -> Tensor:
    return grad.new_empty((tokens, grad.shape[-1]), dtype=torch.promote_types(grad.dtype, torch.float32))


def _unshuffle_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    visible, mask_token, pos_embed, ids_restore, ids_subset = inputs
    ctx.save_for_backward(ids_restore, ids_subset)
    ctx.visible, ctx.tokens = visible.shape[1], pos_embed.shape[0]
    ctx.dtypes = mask_token.dtype, pos_embed.dtype


def _unshuffle_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids_restore, ids_subset = ctx.saved_tensors
    by_visible, by_mask, by_position = None, None, None
    if any(ctx.needs_input_grad[:2]):
        by_visible, by_mask = unshuffle_tokens_backward(grad, ids_restore, ids_subset, ctx.visible)
        by_mask = by_mask.to(ctx.dtypes[0])
    if ctx.needs_input_grad[2]:
        by_position = unshuffle_positions_backward(grad, ids_subset, ctx.tokens).to(ctx.dtypes[1])
    return by_visible, by_mask, by_position, None, None


unshuffle_tokens.register_autograd(_unshuffle_gradients, setup_context=_unshuffle_context)


@torch.library.custom_op("maesil::masked_reconstruction_loss", mutates_args=())
def masked_reconstruction_loss(
    pred: Tensor,
    volume: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    edges: Sequence[int],
    window: Sequence[float],
    windows: Tensor | None,
    mean: float,
    std: float,
    norm_patch: bool,
    eps: float,
    weight: Tensor | None,
    origin: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    """``maesil::masked_reconstruction_loss``, see `maesil.kernels.masked_reconstruction_loss`."""
    lookup = _lookup(volume, ids, patch, edges, window, windows, mean, std, origin, flip)
    loss: Tensor = _run(
        "masked_reconstruction_loss", pred, pred.dtype, pred, volume, ids,
        norm_patch=norm_patch, eps=eps, weight=weight, **lookup,
    )  # fmt: skip
    return loss


@masked_reconstruction_loss.register_fake
def _(pred: Tensor, *_: object) -> Tensor:
    return pred.new_empty((), dtype=torch.promote_types(pred.dtype, torch.float32))


@torch.library.custom_op("maesil::masked_reconstruction_loss_backward", mutates_args=())
def masked_reconstruction_loss_backward(
    grad: Tensor,
    pred: Tensor,
    volume: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    edges: Sequence[int],
    window: Sequence[float],
    windows: Tensor | None,
    mean: float,
    std: float,
    norm_patch: bool,
    eps: float,
    weight: Tensor | None,
    origin: Tensor | None,
    flip: Tensor | None,
) -> Tensor:
    """Gradient of the loss by ``pred``, in its shape and dtype."""
    lookup = _lookup(volume, ids, patch, edges, window, windows, mean, std, origin, flip)
    by_pred: Tensor = _run(
        "masked_reconstruction_loss_backward", pred, pred.dtype, grad, pred, volume, ids,
        norm_patch=norm_patch, eps=eps, weight=weight, **lookup,
    )  # fmt: skip
    return by_pred


@masked_reconstruction_loss_backward.register_fake
def _(grad: Tensor, pred: Tensor, *_: object) -> Tensor:
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pred, volume, ids, patch, edges, window, windows, mean, std, norm_patch, eps, weight, origin, flip = inputs
    ctx.save_for_backward(pred, volume, ids, windows, weight, origin, flip)
    ctx.settings = patch, edges, window, mean, std, norm_patch, eps


def _loss_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pred, volume, ids, windows, weight, origin, flip = ctx.saved_tensors
    patch, edges, window, mean, std, norm_patch, eps = ctx.settings
    by_pred = masked_reconstruction_loss_backward(
        grad, pred, volume, ids, patch, edges, window, windows, mean, std, norm_patch, eps, weight, origin, flip
    )
    return by_pred, *[None] * 13


masked_reconstruction_loss.register_autograd(_loss_gradients, setup_context=_loss_context)
