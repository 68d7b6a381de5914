"""An encoder as a MONAI bundle: MONAI reads scans, runs the encoder and writes tokens. maesil is not needed for it.

The files are those of MONAI's bundle specification. The network is a program of ``torch.export``
(`maesil.downstream.program`), so that every kind of encoder has one. Neither MONAI nor Ignite is imported here.

Shapes: B samples, X Y Z voxels, g patches along an axis, D channels of a token. MONAI's axes are x, y, z.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from maesil.config.schema import ModelConfig
from maesil.downstream.card import Card
from maesil.downstream.program import axes_of, checked_program, encoded, normalised, tried_shape
from maesil.models.encoders import Backbone
from maesil.types import AIR_HU, Intensity

_Number = TypeVar("_Number", int, float)

METADATA, INFERENCE = "configs/metadata.json", "configs/inference.json"
NETWORK, STATE = "models/model.pt2", "models/model.pt"
PAGE, LICENCE = "docs/README.md", "LICENSE"
BUNDLE = (METADATA, INFERENCE, NETWORK, STATE, PAGE, LICENCE)
"""The files of a bundle, below its folder."""
_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_TISSUE_HU = -500
_VERSIONS = {"monai": "1.5.0", "nibabel": "5.3.0", "pytorch-ignite": "0.5.1"}
"""Said where a package is not installed: the lowest that we support."""


class GridOfImage(nn.Module):
    """From windowed and normalised images ``[B, 1, X, Y, Z]`` to grids of tokens ``[B, D, gx, gy, gz]``."""

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image_B1XYZ: Tensor) -> Tensor:
        """See the class."""
        values_BZYX = image_B1XYZ[:, 0].permute(0, 3, 2, 1)
        return grid_of(self.encoder, encoded(self.encoder, values_BZYX), values_BZYX)


def grid_of(encoder: Backbone, tokens_BLD: Tensor, volume_BZYX: Tensor) -> Tensor:
    """Put the tokens of crops on their grids, with MONAI's axes: ``[B, D, gx, gy, gz]``."""
    B, _, D = tokens_BLD.shape
    return tokens_BLD.reshape(B, *encoder.grid(volume_BZYX), D).permute(0, 4, 3, 2, 1)


def bundle_files(encoder: Backbone, card: Card) -> dict[str, bytes]:
    """Return the files of a bundle (`BUNDLE`) by their names.

    UsageError where the network does not give the encoder's tokens.
    """
    state = io.BytesIO()
    torch.save({name: value.cpu() for name, value in GridOfImage(encoder).state_dict().items()}, state)
    texts = {
        METADATA: _json(metadata(encoder, card)),
        INFERENCE: _json(inference(encoder, card)),
        PAGE: page(encoder, card),
        LICENCE: card.licence + "\n",
    }
    return {
        NETWORK: _network(encoder),
        STATE: state.getvalue(),
        **{name: text.encode() for name, text in texts.items()},
    }


@torch.no_grad()
def _network(encoder: Backbone) -> bytes:
    """Return the network as a file; it takes what `axes_of` allows."""
    config = encoder.config
    z, y, x = axes_of(config)
    drawn = torch.Generator().manual_seed(0)
    shapes = ((2, *tried_shape(config)), (1, *config.crop_zyx))
    crops = [torch.randint(-2000, 3072, shape, dtype=torch.int16, generator=drawn) for shape in shapes]
    images = [normalised(crop, encoder.intensity).permute(0, 3, 2, 1)[:, None].contiguous() for crop in crops]
    wanted = [grid_of(encoder, encoder(crop), crop) for crop in crops]
    return checked_program(GridOfImage(encoder), images, (x, y, z), wanted)


def metadata(encoder: Backbone, card: Card) -> dict[str, Any]:
    """Return ``metadata.json`` as MONAI's specification of bundles asks."""
    config, low_high = encoder.config, list(value_range(encoder.intensity))
    patch = " x ".join(map(str, _xyz(config.patch_zyx)))
    channels = {str(channel): f"channel {channel}" for channel in range(encoder.width)}
    image = {"type": "image", "modality": "CT", "dtype": "float32", "is_patch_data": True}
    return {
        "schema": _SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by maesil {card.maesil}"},
        "monai_version": _version_of("monai"),
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {name: _version_of(name) for name in ("nibabel", "pytorch-ignite")},
        "name": f"maesil {config.kind}",
        "task": "Tokens of CT scans: a pre-trained encoder without a head",
        "description": f"A self-supervised encoder (arXiv 2604.00514). It gives one vector of {encoder.width} numbers "
        f"for each patch of {patch} voxels (x, y, z).",
        "authors": "Whoever exported it with maesil",
        "copyright": card.licence,
        "intended_use": "Research. Not a medical device.",
        "references": ["MAESIL. arXiv:2604.00514"],
        "network_data_format": {
            "inputs": {"image": {
                **image, "format": "magnitude", "num_channels": 1, "spatial_shape": _xyz(config.crop_zyx),
                "value_range": low_high, "channel_def": {"0": "HU, windowed and normalised; axes x, y, z of LPS"},
            }},
            "outputs": {"pred": {
                **image, "format": "latent", "num_channels": encoder.width, "spatial_shape": _xyz(config.grid),
                "value_range": [], "channel_def": channels,
            }},
        },
    }  # fmt: skip


def inference(encoder: Backbone, card: Card) -> dict[str, Any]:
    """Return ``inference.json``: from the NIfTI files of ``dataset_dir`` to tokens in ``output_dir``."""
    return {
        "imports": ["$import glob", "$import torch", "$import torch.export.passes", "$import monai"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii') + glob.glob(@dataset_dir + '/*.nii.gz'))",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": "$torch.export.unflatten(torch.export.passes.move_to_device_pass("
        f"torch.export.load(@bundle_root + '/{NETWORK}'), str(@device)))",
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(encoder, card)},
        "dataset": {
            "_target_": "Dataset", "data": "$[{'image': path} for path in @datalist]", "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "windows": {
            "_target_": "SlidingWindowInferer", "roi_size": _xyz(encoder.config.crop_zyx), "sw_batch_size": 1,
            "overlap": _overlaps(encoder.config), "mode": "constant",
        },
        "weights": _weights(encoder.config),
        "inferer": "$setattr(@windows, 'roi_weight_map', @weights) or @windows",
        **_functions(encoder),
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing()},
        "handlers": [{
            "_target_": "CheckpointLoader", "load_path": f"$@bundle_root + '/{STATE}'",
            "load_dict": {"model": "@network"}, "map_location": "@device",
        }],
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader",
            "network": "@network", "inferer": "@inferer", "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "initialize": ["$monai.utils.set_determinism(seed=0)"],
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def _preprocessing(encoder: Backbone, card: Card) -> list[dict[str, Any]]:
    """Return the transforms from a file to what the network sees; without `Card.spacing`, scans stay as they are."""
    config, (lo, hi) = encoder.config, encoder.intensity.window
    floor, ceiling = value_range(encoder.intensity)
    resampled = {"_target_": "Spacingd", "keys": "image", "mode": "bilinear"}
    # Beyond a scan is air, at the ends of the axes alone: so token 0 begins with voxel 0, and windows with a token.
    beyond = {"keys": "image", "method": "end", "mode": "constant", "constant_values": _air(encoder.intensity)}
    return [
        {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader", "ensure_channel_first": True},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "LPS", "labels": None},
        *([resampled | {"pixdim": _xyz(card.spacing)}] if card.spacing else []),
        {
            "_target_": "ScaleIntensityRanged", "keys": "image", "a_min": lo, "a_max": hi, "b_min": floor,
            "b_max": ceiling, "clip": True,
        },
        {"_target_": "SpatialPadd", "spatial_size": _xyz(config.crop_zyx), **beyond},
        {"_target_": "DivisiblePadd", "k": _xyz(config.patch_zyx), **beyond},
    ]  # fmt: skip


def _functions(encoder: Backbone) -> dict[str, str]:
    """Return the expressions by which a grid gets its place in the world, and a scan one vector."""
    patch = _xyz(encoder.config.patch_zyx)
    corner = np.diag([*patch, 1.0])
    corner[:3, 3] = [(edge - 1) / 2 for edge in patch]
    above = _value(_TISSUE_HU, encoder.intensity)
    return {
        "affine_of_tokens": f"$lambda affine: affine.matmul(torch.tensor({corner.tolist()}, dtype=affine.dtype))",
        "placed": "$lambda grid, meta: monai.data.MetaTensor("
        "grid.as_tensor(), meta={**meta, 'affine': @affine_of_tokens(meta['affine'])})",
        "tissue": f"$lambda image: torch.nn.functional.avg_pool3d((image.as_tensor() > {above!r}).float(), {patch})",
        "mean_by": "$lambda grid, weight: (grid * weight).sum((1, 2, 3)) / weight.sum().clamp_min(1e-6)",
    }


def _postprocessing() -> list[Any]:
    """Return what becomes of a grid: its own affine, one vector for the scan, and files for both."""
    files = {"output_dir": "@output_dir"}
    return [
        "$lambda d: {**d, 'vector': @mean_by(d['pred'].as_tensor(), @tissue(d['image'])), "
        "'pred': @placed(d['pred'], d['image'].meta), 'file': dict(d['image'].meta)}",
        {
            "_target_": "SaveImaged", "keys": "pred", "output_postfix": "tokens", "resample": False,
            "separate_folder": False, **files,
        },
        {"_target_": "SaveClassificationd", "keys": "vector", "meta_keys": "file", "filename": "vectors.csv", **files},
    ]  # fmt: skip


def value_range(intensity: Intensity) -> tuple[float, float]:
    """Return what the ends of the window become, in the numbers that an encoder sees."""
    lo, hi = intensity.window
    return _value(lo, intensity), _value(hi, intensity)


def _value(hu: float, intensity: Intensity) -> float:
    (lo, hi), clipped = intensity.window, min(max(hu, intensity.window[0]), intensity.window[1])
    return ((clipped - lo) / (hi - lo) - intensity.mean) / intensity.std


def _air(intensity: Intensity) -> float:
    return _value(AIR_HU, intensity)


def _weights(config: ModelConfig) -> str:
    """Return the expression by which a token counts where windows overlap, as in `whole_scan`: sine squared."""
    edges = list(zip(_xyz(config.crop_zyx), _xyz(config.patch_zyx), strict=True))
    along = "torch.sin(torch.pi * (torch.arange(n, dtype=torch.float64) // p + 0.5) * p / n).square().float()"
    return f"$torch.einsum('x,y,z->xyz', *[{along} for n, p in {edges}])"


def _overlaps(config: ModelConfig) -> list[float]:
    """Return the shares by which windows overlap: half of a crop, or a little less, so that they begin with a patch."""
    steps = [max(edge // 2 // patch, 1) * patch for edge, patch in zip(config.crop_zyx, config.patch_zyx, strict=True)]
    # MONAI rounds (1 - overlap) * edge down: half a voxel keeps it off the edge.
    return [max(0.0, 1 - (step + 0.5) / edge) for step, edge in zip(_xyz(steps), _xyz(config.crop_zyx), strict=True)]


def page(encoder: Backbone, card: Card) -> str:
    """Return ``docs/README.md``: how the bundle is run, and what its files mean."""
    config, (lo, hi) = encoder.config, encoder.intensity.window
    crop, patch = (" x ".join(map(str, _xyz(edges))) for edges in (config.crop_zyx, config.patch_zyx))
    spacing = (
        f"resampled to {' x '.join(f'{mm:g}' for mm in _xyz(card.spacing))} mm"
        if card.spacing
        else "left at their own spacing, since the encoder was trained on several or nobody knows"
    )
    return f"""# Encoder of kind {config.kind}, as a MONAI bundle

    pip install "monai[nibabel,ignite,fire]"
    python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS --output_dir OUT

Run it in the folder of the bundle. SCANS holds CT scans in HU: `.nii.gz` or `.nii`.

* Scans are turned to the axes L, P, S and {spacing}.
* The window {lo:g} to {hi:g} HU becomes 0 to 1. The encoder sees this less {encoder.intensity.mean:.6g},
  divided by {encoder.intensity.std:.6g}.
* The encoder sees windows of {crop} voxels (x, y, z) that overlap by about half.
  A token is the mean of what they make of its patch, less near the faces of a window.
* `OUT/NAME_tokens.nii.gz`: one vector of {encoder.width} numbers (last axis) for each patch of {patch} voxels,
  with the affine of the patches.
* `OUT/vectors.csv`: one line for each scan, its path and the mean of the tokens.
  A token counts by the share of its patch above {_TISSUE_HU} HU.

`models/model.pt2` is the network (`torch.export`), `models/model.pt` its weights.
The network takes images that are windowed and normalised, `[B, 1, X, Y, Z]`.
It gives grids of tokens, `[B, {encoder.width}, gx, gy, gz]`.
Load a bundle only from people you trust: its configuration is code.

Licence: {card.licence}
"""


def _xyz(zyx: Sequence[_Number]) -> list[_Number]:
    return list(reversed(zyx))


def _version_of(package: str) -> str:
    """Return the version of a package; the lowest that is supported, where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return _VERSIONS[package]


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"
