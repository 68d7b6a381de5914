"""The checkpoint of a run: one file, replaced whole, that holds all a run needs to go on or to be used.

``RUN/checkpoint.pt`` is a ``torch.save`` of plain values and tensors, read with ``weights_only=True``. It holds the
SHA-256 of its own content: torch notices a flipped bit in a weight no more than it notices other weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from maesil.config.schema import AS_BEFORE, ModelConfig, RunConfig
from maesil.config.toml import from_document, to_document
from maesil.data.split import Split
from maesil.errors import CheckpointError, ResourceError, UsageError
from maesil.files import whole_file
from maesil.models.masked_autoencoder import ReconstructionModel
from maesil.models.registry import make_model
from maesil.training.optim import Optimizer
from maesil.types import Intensity

CHECKPOINT = "checkpoint.pt"
_FORMAT = "maesil-checkpoint"
_VERSION = 3
_WITHOUT_CHECKSUM = 2
"""The version before, which is still read: it kept no checksum, and later options are those of `AS_BEFORE`."""


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

    def weights_sha256(self) -> str:
        """Return the hash of the weights that are scored and exported, by their content."""
        return content_sha256(self.model.state_dict())


def has_checkpoint(run_dir: Path) -> bool:
    """Return whether a run folder holds a checkpoint."""
    return (run_dir / CHECKPOINT).exists()


def save_checkpoint(
    run_dir: Path,
    *,
    model: ReconstructionModel,
    averaged: ReconstructionModel | None = None,
    optimizer: Optimizer,
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
    document["sha256"] = content_sha256(document)
    path = run_dir / CHECKPOINT
    try:
        with whole_file(path, durable=True) as partial, partial.open("wb") as file:  # in Python's, a full disk is told
            torch.save(document, file)
    except (OSError, RuntimeError) as error:
        reason = _of_the_system(error)
        if reason is None:
            raise
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
        config = from_document(document["config"], AS_BEFORE)
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
    version, checksum = document.get("version"), document.pop("sha256", None)
    if version == _WITHOUT_CHECKSUM and checksum is None:
        return document
    if version != _VERSION:
        raise CheckpointError(f"{path}: expected checkpoint version {_WITHOUT_CHECKSUM} or {_VERSION}, found {version}")
    if checksum != content_sha256(document):
        raise CheckpointError(f"{path}: damaged: its content does not have the checksum it was written with")
    return document


def content_sha256(value: Any) -> str:
    """Return the SHA-256 of dictionaries, lists, plain values and tensors, whatever file or device they are on."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)};".encode())
        for key, one in value.items():
            digest.update(f"{key!r}:".encode())
            _feed(digest, one)
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)};".encode())
        for one in value:
            _feed(digest, one)
    else:
        digest.update(f"{value!r};".encode())


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
