"""An encoder's weights in MONAI's ``ViT`` (and so in ``UNETR``, whose ``vit`` it is). MONAI itself is not imported.

What has to agree: ``patch_size`` and ``img_size`` = the crop, three edges each (z, y, x), ``hidden_size``,
``mlp_dim = 4 * hidden_size``, ``num_layers``, ``num_heads``, ``qkv_bias=True``, ``proj_type="perceptron"``. MONAI
flattens a patch and the grid in the order of the array's axes, so images must lie there as ``[B, 1, Z, Y, X]``,
windowed and normalised beforehand.
"""

from __future__ import annotations

from torch import Tensor, nn

from maesil.downstream.encoder import Encoder, net_of
from maesil.errors import UsageError
from maesil.models.encoders import Backbone, VitEncoder

_NAMES = {
    "patch_embed.": "patch_embedding.patch_embeddings.1.",
    ".attn.qkv.": ".attn.qkv.",
    ".attn.proj.": ".attn.out_proj.",
    ".mlp.0.": ".mlp.linear1.",
    ".mlp.2.": ".mlp.linear2.",
}
"""Parts of names here, and at MONAI; ``blocks.N.norm1``, ``norm2`` and ``norm`` are the same."""


def monai_vit_state(encoder: Encoder | Backbone) -> dict[str, Tensor]:
    """Return the weights under the names of ``monai.networks.nets.ViT``; UsageError unless it is a ViT."""
    encoder = net_of(encoder)
    if not isinstance(encoder, VitEncoder):
        raise UsageError(f"expected an encoder of kind maesil, found {encoder.config.kind}: MONAI has no such network")
    state = {}
    for name, value in encoder.state_dict().items():
        if name == "pos_embed":
            state["patch_embedding.position_embeddings"] = value[None]
            continue
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = value
    return state


def load_into_monai_vit(encoder: Encoder | Backbone, vit: nn.Module) -> nn.Module:
    """Load the weights into a ``monai.networks.nets.ViT`` (of ``UNETR``: its ``.vit``) and return it.

    The layer norms get maesil's epsilon, 1e-6. What MONAI keeps besides and never uses here (cross attention) stays as
    it is. UsageError for another architecture.
    """
    state, own = monai_vit_state(encoder), vit.state_dict()
    # No weight tells the number of heads: with another one they load, and every token is wrong.
    found = {getattr(module, "num_heads", None) for module in vit.modules()} - {None}
    if found != {encoder.config.heads}:
        heads = ", ".join(map(str, found)) or "none"
        raise UsageError(
            f"expected a MONAI ViT of num_heads={encoder.config.heads}, found {heads}; see docs/how-to/use-encoder.md "
            "for the arguments"
        )
    # Nor the shape of a patch, where several have as many voxels.
    axes = [getattr(module, "axes_lengths", {}) for module in vit.modules()]
    patches = {(one["p1"], one["p2"], one["p3"]) for one in axes if "p3" in one}
    if patches and patches != {encoder.config.patch_zyx}:
        raise UsageError(
            f"expected a MONAI ViT of patch_size={encoder.config.patch_zyx}, found {', '.join(map(str, patches))}; see "
            "docs/how-to/use-encoder.md for the arguments"
        )
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    # Newer MONAI makes layers of cross attention in every block and leaves them out unless asked for.
    missing = [name for name in own if name not in state and "cross_attn" not in name]
    if wrong or missing:
        raise UsageError(
            f"expected a MONAI ViT of the encoder's sizes, found other weights ({', '.join([*wrong, *missing][:3])}); "
            "see docs/how-to/use-encoder.md for the arguments"
        )
    vit.load_state_dict(state, strict=False)
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    return vit
