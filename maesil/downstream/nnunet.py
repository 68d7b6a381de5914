"""The way into nnU-Net: a checkpoint that it fine-tunes from, and a plan by which it sees what the encoder learnt.

Both are as MIC-DKFZ/nnUNet reads them at commit 0e495086 (``experiment_planning/like_nnssl.py`` and the trainers of
``nnUNetTrainer/pretraining``), which is not imported. An encoder of ours sees ``(clip(HU, lo, hi) - mean) / std``. That
is nnU-Net's ``CTNormalization`` with these four numbers fixed (`ct_normalisation`).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maesil.documents import canonical_json
from maesil.downstream.primus import SIZES, primus_state
from maesil.errors import UsageError
from maesil.files import write_whole
from maesil.models.encoders import Backbone
from maesil.types import Intensity, Spacing, edges_told

CHECKPOINT, PLAN = "checkpoint_final.pth", "adaptation_plan.json"
_SCHEME = "CTNormalization"
_CHANNEL = "0"
_BY_NAME_PATCH = (8, 8, 8)
CITATIONS = (
    {"type": "Pretraining", "name": "MAESIL",
     "apa_citations": ["MAESIL. arXiv preprint arXiv:2604.00514."]},
    {"type": "Architecture", "name": "Primus",
     "apa_citations": ["Primus: Enforcing Attention Usage for 3D Medical Image Segmentation. "
                       "arXiv preprint arXiv:2503.01835."]},
    {"type": "Masked autoencoder", "name": "MAE",
     "apa_citations": ["Masked Autoencoders Are Scalable Vision Learners. arXiv preprint arXiv:2111.06377."]},
)  # fmt: skip
"""What nnU-Net asks its users to cite."""


def require_for_nnunet(encoder: Backbone) -> None:
    """Raise UsageError for an encoder that nnU-Net has no network for."""
    primus_state(encoder)
    if encoder.config.registers:
        raise UsageError(
            f"model.registers={encoder.config.registers}: expected 0 for nnU-Net, which makes Primus without registers"
        )


def nnunet_files(encoder: Backbone, spacing: Spacing | None) -> dict[str, bytes]:
    """Return what ``nnUNetv2_preprocess_like_nnssl -pc`` takes: ``checkpoint_final.pth`` and ``adaptation_plan.json``.

    From a Hub it takes ``config.json`` besides, which every exported encoder has. ``spacing`` (mm) is that of training;
    None has nnU-Net take the one of its own plan. UsageError unless `require_for_nnunet` holds.
    """
    require_for_nnunet(encoder)
    plan = adaptation_plan(encoder, spacing)
    checkpoint = {"network_weights": primus_state(encoder), "nnssl_adaptation_plan": plan, "citations": list(CITATIONS)}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return {CHECKPOINT: buffer.getvalue(), PLAN: (json.dumps(plan, indent=1) + "\n").encode()}


def adaptation_plan(encoder: Backbone, spacing: Spacing | None) -> dict[str, Any]:
    """Return what nnU-Net must know of the weights to build a network around them."""
    config, crop = encoder.config, list(encoder.config.crop_zyx)
    pretrained = {"spacing": None if spacing is None else list(spacing), "patch_size": crop,
                  "normalization_schemes": [_SCHEME]}  # fmt: skip
    return {
        "architecture_plans": _architecture(encoder),
        "pretrain_plan": {"configurations": {"3d_fullres": pretrained}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": crop,
        "key_to_encoder": "eva",
        "key_to_stem": "down_projection",
        "keys_to_in_proj": ["down_projection.proj"],
        "key_to_lpe": "eva.pos_embed",
        "maesil": {
            "model": config.kind, "intensity": ct_normalisation(encoder.intensity),
            "scheme": f"{_SCHEME} with these four numbers; `maesil nnunet-plan` writes them into a plan",
        },
    }  # fmt: skip


def _architecture(encoder: Backbone) -> dict[str, Any]:
    """Return the network by its name; one of another size by its sizes, as `PretrainedTrainer_Primusx` takes them."""
    config = encoder.config
    name = SIZES.get((config.width, config.depth)) if config.patch_zyx == _BY_NAME_PATCH else None
    sizes = {
        "embed_dim": config.width, "patch_embed_size": list(config.patch_zyx), "encoder_eva_depth": config.depth,
        "encoder_eva_numheads": config.heads, "scale_attn_inner": True, "init_values": 0.1,
    }  # fmt: skip
    return {
        "arch_class_name": name or "PrimusX", "arch_kwargs": None if name else sizes,
        "arch_kwargs_requiring_import": [],
    }  # fmt: skip


def ct_normalisation(intensity: Intensity) -> dict[str, float]:
    """Return the numbers in HU with which nnU-Net's ``CTNormalization`` gives what the encoder sees."""
    lo, hi = intensity.window
    width = hi - lo
    return {
        "percentile_00_5": lo, "percentile_99_5": hi, "mean": lo + intensity.mean * width,
        "std": intensity.std * width,
    }  # fmt: skip


@dataclass(frozen=True)
class ChangedPlan:
    """What became of a plans file."""

    changes: tuple[str, ...]
    """One line each; none where it was as it should be."""
    notes: tuple[str, ...]
    """What is not as in pre-training, and was left."""
    plans_name: str
    configurations: tuple[str, ...]


def change_plan(path: Path, encoder: Backbone, spacing: Spacing | None) -> ChangedPlan:
    """Write the normalisation of an encoder into an nnU-Net plans file, with a new data identifier.

    Every configuration with a normalisation of its own gets it, since all share the intensities. UsageError, the file
    as it was, for a plan that is none, or that says what is not understood.
    """
    plans = _read(path)
    configurations = _configurations(path, plans)
    wanted = ct_normalisation(encoder.intensity)
    changes = []
    for name, configuration in configurations.items():
        of_data = _identifier(configuration["data_identifier"], wanted)
        for key, value in (("normalization_schemes", [_SCHEME]), ("data_identifier", of_data)):
            if configuration[key] != value:
                changes.append(f"configurations.{name}.{key}: {configuration[key]} -> {value}")
                configuration[key] = value
    properties = plans["foreground_intensity_properties_per_channel"][_CHANNEL]
    for key, number in wanted.items():
        if properties.get(key) != number:
            changes.append(f"foreground_intensity_properties_per_channel.{_CHANNEL}.{key}: "
                           f"{properties.get(key)} -> {number:.10g}")  # fmt: skip
            properties[key] = number
    if changes:
        write_whole(path, json.dumps(plans, indent=4) + "\n")
    notes = _notes(configurations, encoder, spacing)
    return ChangedPlan(tuple(changes), notes, str(plans["plans_name"]), tuple(configurations))


def _read(path: Path) -> dict[str, Any]:
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: expected a plans file of nnU-Net, found none; check the path") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: expected a plans file of nnU-Net, found what is no JSON ({error})") from error
    if not isinstance(plans, dict):
        raise UsageError(f"{path}: expected a plans file of nnU-Net, found a {type(plans).__name__}")
    return plans


def _configurations(path: Path, plans: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configurations with a normalisation of their own; UsageError for what is not understood."""

    def require(holds: bool, expected: str, found: object) -> None:
        if not holds:
            raise UsageError(f"{path}: expected {expected}, found {found}; the file was left as it was")

    keys = ("plans_name", "configurations", "foreground_intensity_properties_per_channel", "transpose_forward")
    require(all(key in plans for key in keys), f"a plan of nnU-Net v2 with {', '.join(keys)}", ", ".join(plans) or "{}")
    channels, turned = plans["foreground_intensity_properties_per_channel"], plans["transpose_forward"]
    require(isinstance(channels, dict) and list(channels) == [_CHANNEL], "one channel, of CT",
            f"channels {', '.join(map(str, channels))}")  # fmt: skip
    require(turned == [0, 1, 2], "axes as the encoder learnt them (transpose_forward of 0, 1, 2)", turned)
    found = {}
    configurations = plans["configurations"]
    require(isinstance(configurations, dict), "configurations by their names", type(configurations).__name__)
    for name, configuration in configurations.items():
        if "inherits_from" in configuration and "normalization_schemes" not in configuration:
            continue
        schemes, masks = (configuration.get(key) for key in ("normalization_schemes", "use_mask_for_norm"))
        require(isinstance(schemes, list) and len(schemes) == 1, f"one normalisation in {name}", schemes)
        require(masks == [False], f"a normalisation of all voxels in {name} (use_mask_for_norm of false)", masks)
        require(isinstance(configuration.get("data_identifier"), str), f"a data_identifier in {name}", "none")
        found[name] = configuration
    require("3d_fullres" in found, "a configuration 3d_fullres", ", ".join(configurations) or "none")
    return found


def _identifier(before: str, wanted: Mapping[str, float]) -> str:
    """Return the name of the folder of preprocessed data: other numbers, another folder."""
    digest = hashlib.sha256(canonical_json(dict(wanted))).hexdigest()[:8]
    stem = before.split("___Norm__")[0]
    return f"{stem}___Norm__CT_maesil_{digest}"


def _notes(configurations: Mapping[str, Any], encoder: Backbone, spacing: Spacing | None) -> tuple[str, ...]:
    fullres, notes = configurations["3d_fullres"], []
    found = fullres.get("spacing")
    if spacing is not None and [round(float(mm), 3) for mm in found or []] != [round(mm, 3) for mm in spacing]:
        notes.append(f"3d_fullres has a spacing of {found} mm, the encoder learnt at {list(spacing)}")
    patch = fullres.get("patch_size")
    if patch != list(encoder.config.crop_zyx):
        learnt = edges_told(encoder.config.crop)
        notes.append(f"3d_fullres has patches of {patch} voxels, the encoder learnt on {learnt}")
    return tuple(notes)
