"""The three operations between int16 superpatches and the loss, without float volumes or targets in memory.

``gather_patches`` cuts and normalises the visible patches, ``unshuffle_tokens`` puts encoded tokens back onto
the grid for the decoder, ``masked_reconstruction_loss`` compares predictions with voxels it looks up itself.
Conventions they share:

* token ``l`` of grid ``(gz, gy, gx)`` is ``(iz * gy + iy) * gx + ix``; the V voxels of a patch are
  flattened ``z, y, x``; its size is one edge, or ``(z, y, x)``; ids are int64;
* volumes are int16 HU ``[B, Z, Y, X]``; a value is ``((clip(hu, lo, hi) - lo) / (hi - lo) - mean) / std``;
* ``window`` is ``(lo, hi)`` in HU, or a ``[B, 2]`` tensor with one window per sample;
* ``origin`` int64 ``[B, 3]`` and ``size`` (one edge, or ``(z, y, x)``) cut a superpatch out of a larger scan,
  and ids then count its own patches; ``flip`` bool ``[B, 3]`` mirrors that superpatch along z, y, x. Given
  the same three, gather and loss see the same voxels.

Each runs as a PyTorch operator: by its definition (`maesil.kernels.reference`) on a CPU, by Triton on CUDA, or as
``use_kernels`` says. Gradients reach ``pred``, ``visible``, ``mask_token`` and ``pos_embed``; the rest is data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maesil.kernels import library
from maesil.kernels.library import CHOICES, can_run_triton, use_kernels, what_triton_lacks
from maesil.kernels.reference import Edges, Size, Window, edges_of, superpatch_edges

__all__ = [
    "CHOICES", "can_run_triton", "gather_patches", "masked_reconstruction_loss", "unshuffle_tokens", "use_kernels",
    "what_triton_lacks",
]  # fmt: skip


def gather_patches(
    volume: Tensor,
    ids_keep: Tensor,
    *,
    patch_size: Size,
    window: Window,
    mean: float,
    std: float,
    dtype: torch.dtype,
    origin: Tensor | None = None,
    flip: Tensor | None = None,
    size: Size | None = None,
) -> Tensor:
    """Cut the visible patches out of int16 volumes, windowed and normalised, ready for the patch embedding.

    ``volume [B, Z, Y, X]`` and ``ids_keep [B, N]`` give ``[B, N, V]`` of ``dtype``: what ``patchify`` and
    the gather in ``random_masking`` do together in facebookresearch/mae ``models_mae.py``. Raises ValueError
    for shapes that do not fit and, on a CPU, for superpatches that leave the volume.
    """
    patch, edges = _check_patches(volume, ids_keep, patch_size, window, origin, flip, size)
    operation = library.gather_patches_at_once if library.at_once(volume) else library.gather_patches
    patches: Tensor = operation(
        volume, ids_keep.long(), patch, edges, *_window_arguments(window), mean, std, dtype, origin, flip
    )
    return patches


def unshuffle_tokens(
    visible: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    ids_restore: Tensor,
    ids_subset: Tensor | None = None,
) -> Tensor:
    """Put visible tokens back at their grid positions, the mask token elsewhere, and add position codes.

    ``visible [B, N, D]``, ``mask_token [D]``, ``pos_embed [L, D]``, ``ids_restore [B, L]`` give ``[B, L, D]``
    of the dtype of ``visible``: position ``l`` holds visible token ``ids_restore[b, l]`` where that is below
    N (the first lines of ``forward_decoder`` in facebookresearch/mae ``models_mae.py``). With ``ids_subset
    [B, S]`` only those positions are made, in that order: ``[B, S, D]``. Raises ValueError for shapes that do
    not fit.
    """
    width, tokens = visible.shape[-1], ids_restore.shape[1]
    if mask_token.shape != (width,) or pos_embed.shape != (tokens, width):
        raise ValueError(
            f"mask_token must be [{width}] and pos_embed [{tokens}, {width}] to fit visible and ids_restore, "
            f"got {list(mask_token.shape)} and {list(pos_embed.shape)}"
        )
    ids_subset = None if ids_subset is None else ids_subset.long()
    operation = library.unshuffle_tokens_at_once if library.at_once(visible) else library.unshuffle_tokens
    placed: Tensor = operation(visible, mask_token, pos_embed, ids_restore.long(), ids_subset)
    return placed


def masked_reconstruction_loss(
    pred: Tensor,
    volume: Tensor,
    ids_masked: Tensor,
    *,
    patch_size: Size,
    window: Window,
    mean: float,
    std: float,
    norm_patch: bool = False,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    origin: Tensor | None = None,
    flip: Tensor | None = None,
    size: Size | None = None,
) -> Tensor:
    """Average the squared error over the hidden patches, each patch counting by its weight.

    ``pred [B, M, V]`` stands against the voxels of ``ids_masked [B, M]``; ``weight [B, M]`` (default 1) is
    divided by its sum over the whole batch: a patch of weight 0 gets no gradient, all 0 give a loss of 0.
    ``norm_patch`` brings each true patch to mean 0 and (unbiased) variance 1, ``eps`` inside the root: the
    ``norm_pix_loss`` of MAE (arXiv 2111.06377). Returns a float32 scalar (float64 for float64 predictions).
    Raises ValueError for shapes that do not fit and, on a CPU, for superpatches that leave the volume.
    """
    patch, edges = _check_patches(volume, ids_masked, patch_size, window, origin, flip, size)
    if pred.shape != (*ids_masked.shape, math.prod(patch)):
        raise ValueError(f"pred must be {[*ids_masked.shape, math.prod(patch)]}, got {list(pred.shape)}")
    if weight is not None and weight.shape != ids_masked.shape:
        raise ValueError(f"weight must be {list(ids_masked.shape)} like ids_masked, got {list(weight.shape)}")
    if weight is not None and weight.requires_grad:
        raise ValueError("weight is data and gets no gradient; detach it")
    loss: Tensor = library.masked_reconstruction_loss(
        pred, volume, ids_masked.long(), patch, edges, *_window_arguments(window), mean, std, norm_patch, eps,
        weight, origin, flip,
    )  # fmt: skip
    return loss


def _window_arguments(window: Window) -> tuple[tuple[float, float], Tensor | None]:
    """Split a window into the two arguments of the operators: numbers, which no GPU waits for, and a tensor."""
    if isinstance(window, Tensor):
        return (0.0, 1.0), window
    lo, hi = window
    return (float(lo), float(hi)), None


def _check_patches(
    volume: Tensor,
    ids: Tensor,
    patch: Size,
    window: Window,
    origin: Tensor | None,
    flip: Tensor | None,
    size: Size | None,
) -> tuple[Edges, Edges]:
    """Refuse shapes that the lookup would misread; return the edges of patch and superpatch (z, y, x) in voxels."""
    if volume.ndim != 4 or ids.ndim != 2 or len(volume) != len(ids):
        raise ValueError(f"volume [B, Z, Y, X] and ids [B, N] expected, not {list(volume.shape)}, {list(ids.shape)}")
    if volume.dtype != torch.int16:
        raise ValueError(f"volume must hold int16 HU, got {volume.dtype}")
    edges, of_patch = superpatch_edges(volume, size), edges_of(patch)
    if any(edge % one for edge, one in zip(edges, of_patch, strict=True)):
        raise ValueError(f"superpatch edges {edges} are not all divisible by the patch edges {of_patch}")
    if isinstance(window, Tensor) and window.shape not in ((2,), (len(volume), 2)):
        raise ValueError(f"window must be (lo, hi) or [{len(volume)}, 2], got {list(window.shape)}")
    for name, value in (("origin", origin), ("flip", flip)):
        if value is not None and value.shape != (len(volume), 3):
            raise ValueError(f"{name} must be [{len(volume)}, 3] (z, y, x), got {list(value.shape)}")
    return of_patch, edges
