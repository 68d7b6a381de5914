"""The checkpoint of a run: one file, replaced whole, that holds all a run needs to go on or to be used.

``RUN/checkpoint.pt`` is a ``torch.save`` of plain values and tensors, read with ``weights_only=True``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from maesil.cache.provenance import StoreUse, recorded_uses, what_changed
from maesil.config.schema import ModelConfig, RunConfig
from maesil.config.toml import from_document, to_document
from maesil.data.split import Split
from maesil.errors import CheckpointError, ResourceError, UsageError
from maesil.models.masked_autoencoder import ReconstructionModel
from maesil.models.registry import make_model
from maesil.types import Intensity

CHECKPOINT = "checkpoint.pt"
_FORMAT = "maesil-checkpoint"
_VERSION = 2

FREE_ON_RESUME = {
    "steps", "lr", "weight_decay", "betas", "warmup", "clip", "validation_crops", "log_every", "validate_every",
    "checkpoint_every", "picture_every", "readers", "threads", "device", "minutes", "compile", "kernels", "accumulate",
    "ram", "device_resident",
}  # fmt: skip
"""Training options that may change between a checkpoint and its resumption."""


@dataclass(frozen=True)
class Run:
    """A trained model, or one on its way, with all that its numbers mean."""

    model: ReconstructionModel
    """With the averaged weights, if the run keeps an average; else with those of the last step."""
    intensity: Intensity
    config: RunConfig
    split: Split
    step: int
    """Optimiser steps done."""
    store_fingerprints: tuple[str, ...]
    last_weights: dict[str, Any]
    """The weights of the last step, which training goes on from."""
    optimizer_state: dict[str, Any]
    rng_state: dict[str, Any]
    torch_version: str
    ranks: int = 1
    """Processes that trained it up to this step."""


def has_checkpoint(run_dir: Path) -> bool:
    """Return whether a run folder holds a checkpoint."""
    return (run_dir / CHECKPOINT).exists()


def save_checkpoint(
    run_dir: Path,
    *,
    model: ReconstructionModel,
    averaged: ReconstructionModel | None = None,
    optimizer: torch.optim.Optimizer,
    step: int,
    intensity: Intensity,
    config: RunConfig,
    split: Split,
    store_fingerprints: tuple[str, ...],
    ranks: int = 1,
) -> None:
    """Write ``RUN/checkpoint.pt`` durably and all at once: a kill leaves the old or the new one, never a part."""
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "torch": str(torch.__version__),
        "step": step,
        "ranks": ranks,
        "config": to_document(config),
        "intensity": {**asdict(intensity), "window": list(intensity.window)},
        "split": {name: list(groups) for name, groups in asdict(split).items()},
        "stores": list(store_fingerprints),
        "model": model.state_dict(),
        "averaged": averaged.state_dict() if averaged else None,
        "optimizer": optimizer.state_dict(),
        "rng": {"cpu": torch.get_rng_state(), "cuda": _device_rng(next(model.parameters()).device)},
    }
    path = run_dir / CHECKPOINT
    temporary = path.with_suffix(".partial")
    try:
        with temporary.open("wb") as file:
            torch.save(document, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(run_dir)
    except (OSError, RuntimeError) as error:
        reason = _of_the_system(error)
        if reason is None:
            raise
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{path}: could not be written ({reason.strerror}); free space, then --resume") from error


def _of_the_system(error: BaseException | None) -> OSError | None:
    """Return the system's own error behind one that torch raised while it wrote: the disk was full, for example."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def load_run(run_dir: Path, device: torch.device | str = "cpu") -> Run:
    """Load a run from its folder; CheckpointError, in one line, for whatever is not a whole checkpoint of ours."""
    path = run_dir / CHECKPOINT
    document = _read_document(path)
    try:
        config = from_document(document["config"])
        intensity = Intensity(**{**document["intensity"], "window": tuple(document["intensity"]["window"])})
        split = Split(**{name: tuple(groups) for name, groups in document["split"].items()})
        state, step, stores = document["model"], document["step"], tuple(document["stores"])
        averaged = document["averaged"]
        optimizer_state, rng_state, version = document["optimizer"], document["rng"], document["torch"]
        ranks = document.get("ranks", 1)  # written since there can be several
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{path}: expected a whole maesil checkpoint, found it incomplete ({error!r})") from error
    model = _rebuild_model(path, config.model, averaged or state).to(device)
    return Run(model, intensity, config, split, step, stores, state, optimizer_state, rng_state, version, ranks)


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Bring torch's generators back to where they were; maesil itself draws nearly all from (seed, step) only.

    Every rank goes on with the state of the first rank's GPU, on its own one: what a VQ-VAE draws is alike on all.
    """
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0], device)


def _device_rng(device: torch.device) -> list[torch.Tensor]:
    """Return the state of a GPU's generator, if a run is on one."""
    return [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []


def require_resumable(
    run: Run, config: RunConfig, store_fingerprints: tuple[str, ...], run_dir: Path, uses: Sequence[StoreUse] = ()
) -> None:
    """Raise CheckpointError unless going on with ``config`` and these stores means going on with the same run.

    ``uses`` is what the stores are now, to say what changed.
    """
    saved, wanted = to_document(run.config), to_document(config)
    for section, values in saved.items():
        for name, value in values.items():
            if value != wanted[section][name] and not (section == "train" and name in FREE_ON_RESUME):
                raise CheckpointError(
                    f"{run_dir}: the checkpoint was made with {section}.{name}={value}, asked for is "
                    f"{wanted[section][name]}; resume without changing it, or train anew with another --out"
                )
    advice = "resume on the stores it was trained on, or train anew with another --out"
    noted = recorded_uses(run_dir)
    if run.store_fingerprints != store_fingerprints:
        changed = what_changed(noted, uses) or "volumes were added, removed or remade"
        raise CheckpointError(f"{run_dir}: the stores changed since the checkpoint ({changed}); {advice}")
    before, now = ({use.fingerprint: use.weight for use in some} for some in (noted, uses))
    if noted and uses and before != now:
        weights = [", ".join(f"{weight}" for weight in some.values()) for some in (before, now)]
        raise CheckpointError(
            f"{run_dir}: the run was begun with store weights {weights[0]}, asked for is {weights[1]}; {advice}"
        )


def _read_document(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent}: expected a run folder made by `maesil train`, found none")
    if not path.exists():
        raise CheckpointError(f"{path.parent}: expected a run folder made by `maesil train`, found no {CHECKPOINT}")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in a dozen ways on what is no checkpoint
        reason = str(error).partition("\n")[0][:120]
        raise CheckpointError(f"{path}: damaged, cut short or no checkpoint at all ({reason})") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: expected a checkpoint of maesil, found one of another program")
    if document.get("version") != _VERSION:
        raise CheckpointError(f"{path}: expected checkpoint version {_VERSION}, found {document.get('version')}")
    return document


def _rebuild_model(path: Path, config: ModelConfig, state: dict[str, torch.Tensor]) -> ReconstructionModel:
    model = make_model(config)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: its weights do not have the shapes its configuration says ({reason})"
        ) from error
    return model


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
