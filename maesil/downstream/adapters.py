"""Any other encoder beside those of maesil: a function from an int16 HU crop ``[z, y, x]`` to tokens ``[n, d]``.

The tokens lie on a grid over the crop, in the order z, y, x, without a class token. Where that grid is another than the
run's, each patch of the run takes the mean of the tokens within it, or the token that it lies in.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from maesil.config.schema import ModelConfig
from maesil.errors import UsageError
from maesil.models.encoders import Backbone
from maesil.types import AIR_HU, HuArray, Intensity, Zyx, edges_told

Adapter = Callable[[HuArray], NDArray[np.floating] | Tensor]


class AdaptedEncoder(Backbone):
    """Somebody's function as an encoder of the run's crops. It is never trained."""

    def __init__(self, name: str, function: Adapter, config: ModelConfig, intensity: Intensity) -> None:
        super().__init__(config, intensity)
        self.name, self.function = name, function
        crop = config.crop_zyx
        self.width = self._tokens(np.full(crop, AIR_HU, np.int16)).shape[1]

    def forward_features(self, volume_BZYX: Tensor) -> Tensor:
        """See `Backbone.forward_features`."""
        grid = self.grid(volume_BZYX)
        shape: Zyx = (volume_BZYX.shape[1], volume_BZYX.shape[2], volume_BZYX.shape[3])
        tokens = [on_grid(self._tokens(one), shape, grid, self.name) for one in volume_BZYX.cpu().numpy()]
        return torch.stack(tokens).to(volume_BZYX.device)

    def encode(self, patches_BLV: Tensor, grid: Zyx) -> Tensor:
        """Refuse: the function takes crops."""
        raise TypeError(f"{self.name} takes crops, not patches")

    @torch.no_grad()
    def _tokens(self, crop: HuArray) -> Tensor:
        tokens = torch.as_tensor(self.function(np.array(crop))).detach().float().cpu()
        if tokens.ndim != 2 or not tokens.isfinite().all():
            raise UsageError(f"--adapter {self.name}: expected finite tokens [n, d], found shape {list(tokens.shape)}")
        return tokens


def load_adapter(name: str, config: ModelConfig, intensity: Intensity) -> AdaptedEncoder:
    """Import ``module:function``, from the working folder too; UsageError in one line for what cannot be used."""
    module, _, function = name.partition(":")
    if not (module and function):
        raise UsageError(f"--adapter: expected module:function, found {name!r}")
    try:
        sys.path.insert(0, str(Path.cwd()))
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--adapter {name}: cannot import it ({error})") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    return AdaptedEncoder(name, found, config, intensity)


def on_grid(tokens_nd: Tensor, shape: Zyx, grid: Zyx, name: str) -> Tensor:
    """Bring tokens of cubic patches of a crop onto another grid of patches: ``[n, d]`` to ``[L, d]``."""
    own = grid if len(tokens_nd) == math.prod(grid) else _cubic_grid(len(tokens_nd), shape)
    if own is None:
        raise UsageError(
            f"--adapter {name}: expected one token for each cubic patch of a crop of {edges_told(shape)}, "
            f"found {len(tokens_nd)} tokens; leave out a class token"
        )
    field = tokens_nd.T.reshape(1, -1, *own)
    if own != grid:
        finer = math.prod(own) > math.prod(grid)
        field = functional.adaptive_avg_pool3d(field, grid) if finer else functional.interpolate(field, grid)
    return field[0].flatten(1).T


def _cubic_grid(tokens: int, shape: Zyx) -> Zyx | None:
    edge = round((math.prod(shape) / max(tokens, 1)) ** (1 / 3))
    fits = edge > 0 and all(n % edge == 0 for n in shape) and math.prod(n // edge for n in shape) == tokens
    return (shape[0] // edge, shape[1] // edge, shape[2] // edge) if fits else None
