"""Weights that a new run begins with: of another run, or of an exported encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from maesil.data.known_scans import EARLIER, KnownScan, read_scans
from maesil.data.split import Split
from maesil.documents import read_json, write_json
from maesil.errors import CheckpointError
from maesil.models.encoders import Backbone, encoder_of
from maesil.models.masked_autoencoder import ReconstructionModel
from maesil.text import counted
from maesil.training.checkpoint import content_sha256, load_run

INIT_FROM = "init_from.json"
"""Beside the checkpoint: which weights the run began with, where it began with others than its own."""
_AN_ENCODER = "an exported encoder"


@dataclass(frozen=True)
class Beginning:
    """Where the first weights of a run came from, and the scans they have seen."""

    source: str = ""
    sha256: str = ""
    """Of the weights, by their content."""
    scans: tuple[KnownScan, ...] = ()
    known: bool = True
    """Whether it is known what the weights have seen."""

    def record(self, run_dir: Path) -> None:
        """Write into a run folder which weights it begins with; remove what a run before it left."""
        if self.source:
            write_json(run_dir / INIT_FROM, {"source": self.source, "sha256": self.sha256})
        else:
            (run_dir / INIT_FROM).unlink(missing_ok=True)

    def told(self, split: Split) -> list[str]:
        """Return what is to be said of them."""
        if not self.source:
            return []
        told = [f"the first weights are those of {self.source}"]
        if not self.known:
            told.append(f"{self.source} does not say which scans it has seen: scores of them would look like new ones")
        seen = {scan.group for scan in self.scans} & set(split.validation)
        if seen:
            told.append(
                f"{counted(len(seen), 'patient')} held out, seen by these weights before: such scores are optimistic"
            )
        return told


def beginning(source: Path | Backbone, model: ReconstructionModel) -> Beginning:
    """Load weights into a model: all of a run's (the averaged ones, if it keeps an average), or an encoder's.

    CheckpointError where there are none, or they do not fit.
    """
    if isinstance(source, Backbone):
        own = encoder_of(model, source.intensity)
        # A code of positions that is not learnt follows from the crop.
        positions = {name: value for name, value in own.named_buffers() if name == "pos_embed"}
        _load(own, {**source.state_dict(), **positions}, "the encoder")
        model.train()
        return Beginning(_AN_ENCODER, weights_sha256(source), known=False)
    run = load_run(source)
    _load(model, run.model.state_dict(), str(source))
    scans = read_scans(source)
    seen = tuple(replace(scan, part=EARLIER) for scan in scans or ())
    return Beginning(str(source), run.weights_sha256(), seen, scans is not None)


def require_same_beginning(run_dir: Path, source: Path | Backbone) -> str:
    """Return what is to be said where a run that goes on is given the weights it began with: they are not loaded.

    CheckpointError for other weights than those, or where the run does not know them.
    """
    if found := other_beginning(run_dir, source):
        raise CheckpointError(
            f"{run_dir}: the run was begun with {found}; leave out --init-from to go on with the run, or begin a new "
            "one with another --out"
        )
    return f"the run began with the weights of {_name(source)} and goes on from its checkpoint"


def other_beginning(run_dir: Path, source: Path | Backbone | None) -> str:
    """Return in what the weights that a run began with differ from those asked for; empty where they are the same."""
    noted = read_json(run_dir / INIT_FROM) if (run_dir / INIT_FROM).exists() else None
    began = f"the weights of {noted['source']}" if noted else "no --init-from noted"
    if source is None:
        return f"{began}, now without --init-from" if noted else ""
    if noted and noted["sha256"] == weights_sha256(source):
        return ""
    return f"{began}, now --init-from {_name(source)}{': other weights' if noted else ''}"


def weights_sha256(source: Path | Backbone) -> str:
    """Return the hash of the weights of a run or an exported encoder, by their content."""
    return content_sha256(source.state_dict()) if isinstance(source, Backbone) else load_run(source).weights_sha256()


def _name(source: Path | Backbone) -> str:
    return _AN_ENCODER if isinstance(source, Backbone) else str(source)


def _load(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"--init-from: the weights of {source} do not fit the model of this configuration ({reason}); take the "
            "model options that they were made with"
        ) from error
