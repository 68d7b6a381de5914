"""An encoder as a program of ``torch.export``: one file that runs where PyTorch alone is installed.

The kernels' operators are not in it: patches are cut by operators of PyTorch itself, by the same formula. A file is
written only if the program that is read back from it gives the encoder's tokens.

Shapes: B samples, Z Y X voxels, g patches along an axis, L tokens, D channels of a token.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maesil.config.schema import ModelConfig
from maesil.errors import UsageError
from maesil.models.encoders import Backbone
from maesil.models.patches import patchify
from maesil.types import Intensity, Zyx

PROGRAM = "model.pt2"
TOLERANCE = 1e-5
"""Largest difference of a program's tokens, absolute and relative."""


class TokensOfHu(nn.Module):
    """From int16 HU ``[B, Z, Y, X]`` to tokens ``[B, L, D]``, as `Backbone.forward_features`; the window is inside."""

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, volume_BZYX: Tensor) -> Tensor:
        """See the class."""
        return encoded(self.encoder, normalised(volume_BZYX, self.encoder.intensity))


def normalised(volume_BZYX: Tensor, intensity: Intensity) -> Tensor:
    """Turn HU into the numbers that an encoder sees, float32, in the order of operations of `maesil.kernels`."""
    (lo, hi), mean, std = intensity.window, intensity.mean, intensity.std
    return volume_BZYX.float().clamp(lo, hi).sub(lo).div(hi - lo).sub(mean).div(std)


def encoded(encoder: Backbone, values_BZYX: Tensor) -> Tensor:
    """Encode windowed and normalised crops: tokens ``[B, L, D]``."""
    return encoder.encode(patchify(values_BZYX, encoder.config.patch), encoder.grid(values_BZYX))


def program_files(encoder: Backbone) -> dict[str, bytes]:
    """Return the encoder as `PROGRAM`, see `TokensOfHu`: any number of crops, of any size that `axes_of` allows.

    UsageError where the program does not give the encoder's tokens.
    """
    config = encoder.config
    crops = [_hu(2, tried_shape(config)), _hu(1, config.crop_zyx)]
    with torch.no_grad():
        wanted = [encoder(crop) for crop in crops]
    return {PROGRAM: checked_program(TokensOfHu(encoder), crops, axes_of(config), wanted)}


def axes_of(config: ModelConfig) -> list[Any]:
    """Return what edges (z, y, x) a program takes: multiples of a patch's, from two patches on."""
    from torch.export import Dim  # takes seconds, and who loads an encoder has no use for it

    return [patch * Dim(f"grid_{axis}") for axis, patch in zip("zyx", config.patch_zyx, strict=True)]


def tried_shape(config: ModelConfig) -> Zyx:
    """Return a small crop of another shape than that of training, on which a program is made."""
    z, y, x = (patch * tried for patch, tried in zip(config.patch_zyx, (2, 3, 4), strict=True))
    return z, y, x


@torch.no_grad()
def checked_program(
    module: nn.Module, inputs: Sequence[Tensor], edges: Sequence[Any], expected: Sequence[Tensor]
) -> bytes:
    """Return a module as a file of ``torch.export``, made on the first of the inputs, that gives what is expected.

    The first axis counts crops; ``edges`` say how the last ones may change, as `axes_of` does. UsageError where what is
    read back from the file gives other numbers.
    """
    import torch.export

    shapes = ({0: torch.export.Dim("batch"), **dict(enumerate(edges, start=inputs[0].ndim - len(edges)))},)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module.eval(), (inputs[0],), dynamic_shapes=shapes), buffer)
    content = buffer.getvalue()
    require_same(torch.export.load(io.BytesIO(content)).module(), inputs, expected)
    return content


def require_same(run: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise UsageError unless a program gives what is expected of it, to `TOLERANCE`."""
    for given, wanted in zip(inputs, expected, strict=True):
        found = run(given)
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE):
            off = (found - wanted).abs().max().item() if found.shape == wanted.shape else list(found.shape)
            raise UsageError(
                f"expected a program that gives the encoder's tokens within {TOLERANCE:g}, found {off} with PyTorch "
                f"{torch.__version__}; nothing was written, export without --format, or with another PyTorch"
            )


def _hu(count: int, shape: Zyx) -> Tensor:
    """Draw crops of HU, within and beyond any window."""
    return torch.randint(-2000, 3072, (count, *shape), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
