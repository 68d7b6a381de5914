"""An encoder of kind ``primus`` under the names of ``dynamic-network-architectures``, which is not imported."""

from __future__ import annotations

from torch import Tensor

from maesil.errors import UsageError
from maesil.models.encoders import Backbone, PrimusEncoder

SIZES = {(396, 12): "PrimusS", (792, 12): "PrimusB", (864, 16): "PrimusM", (1056, 24): "PrimusL"}
"""Width and depth of the networks that nnU-Net knows by name."""


def primus_state(encoder: Backbone) -> dict[str, Tensor]:
    """Return the weights of ``Primus`` (``init_values=0.1, scale_attn_inner=True``) but for its ``up_projection``.

    UsageError unless the encoder is of kind ``primus``.
    """
    if not isinstance(encoder, PrimusEncoder):
        raise UsageError(
            f"expected an encoder of kind primus, found {encoder.config.kind}: nnU-Net has no such network"
        )
    state = {}
    for name, value in encoder.state_dict().items():
        value = value.detach().cpu().contiguous()
        if name == "patch_embed.weight":
            state["down_projection.proj.weight"] = value.view(-1, 1, *encoder.config.patch_zyx)
        elif name == "patch_embed.bias":
            state["down_projection.proj.bias"] = value
        elif name == "register_tokens":
            state[name] = value[None]
        else:
            state[f"eva.{name}"] = value[None] if name == "pos_embed" else value
    return state
