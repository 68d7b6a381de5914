"""The Hugging Face Hub: its mixin where ``huggingface_hub`` is installed, else the same words for folders alone.

An encoder is three files there, those of `maesil export`. Nothing that is fetched is executed: a card in JSON, weights
in safetensors, which the card vouches for.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maesil.downstream.card import CARD, read_card
from maesil.errors import CheckpointError, UsageError

HAS_HUB = find_spec("huggingface_hub") is not None
_NO_HUB = "expected the package huggingface_hub, found none; pip install 'maesil[hub]'"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class LocalMixin(ABC):
    """What the mixin of ``huggingface_hub`` offers, for folders of this machine."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Load from a folder of `maesil export`."""
        return cls._from_pretrained(model_id=str(pretrained_model_name_or_path), **options)

    @classmethod
    @abstractmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
        """Load from a folder."""

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write to a folder."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self._save_pretrained(Path(save_directory))

    @abstractmethod
    def _save_pretrained(self, save_directory: Path) -> None:
        """Write to a folder that is there."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Raise UsageError: there is no way to the Hub without its package."""
        raise UsageError(f"{repo_id}: {_NO_HUB}")


if TYPE_CHECKING or not HAS_HUB:
    HubMixin = LocalMixin
else:
    import huggingface_hub

    HubMixin = huggingface_hub.PyTorchModelHubMixin


def is_name(place: str) -> bool:
    """Return whether a text names a repository of the Hub (USER/NAME) and no folder of this machine."""
    return _NAME.fullmatch(place) is not None and not Path(place).exists()


def fetched(name: str, **options: Any) -> Path:
    """Return a folder of this machine with an encoder's files: the one named, or what the Hub has under USER/NAME.

    ``options`` are those of ``hf_hub_download``, such as revision, cache_dir and token. UsageError without
    ``huggingface_hub``, CheckpointError where the Hub has no such encoder or cannot be reached.
    """
    if not is_name(name):
        return Path(name)
    if not HAS_HUB:
        raise UsageError(f"{name}: no such folder; to fetch it from the Hub, {_NO_HUB}")
    from huggingface_hub import hf_hub_download

    given = {key: value for key, value in options.items() if value is not None}
    try:
        folder = Path(hf_hub_download(name, CARD, **given)).parent
        hf_hub_download(name, read_card(folder).weights.file, **given)
    except (OSError, ValueError) as error:  # all errors of the package are of these kinds
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: expected an encoder of maesil on the Hub, found none ({reason})") from error
    return folder


def push(folder: Path, name: str) -> str:
    """Upload an exported encoder to the Hub, making USER/NAME if need be; return its address.

    UsageError without ``huggingface_hub``, or where the Hub does not take it.
    """
    if not HAS_HUB:
        raise UsageError(f"{name}: {_NO_HUB}")
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repo = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Encoder exported by maesil")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{name}: expected a place on the Hub to write to, found none ({reason})") from error
    return f"{api.endpoint}/{repo}"
