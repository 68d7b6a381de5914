"""Weights that a new run begins with: of another run, or of an exported encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from maesil.data.scans import EARLIER, Scan, read_scans
from maesil.data.split import Split
from maesil.errors import CheckpointError
from maesil.models.encoders import Encoder, encoder_of
from maesil.models.masked_autoencoder import ReconstructionModel
from maesil.text import counted
from maesil.training.checkpoint import load_run


@dataclass(frozen=True)
class Beginning:
    """Where the first weights of a run came from, and the scans they have seen."""

    source: str = ""
    scans: tuple[Scan, ...] = ()
    known: bool = True
    """Whether it is known what the weights have seen."""

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


def beginning(source: Path | Encoder, model: ReconstructionModel) -> Beginning:
    """Load weights into a model: all of a run's (the averaged ones, if it keeps an average), or an encoder's.

    CheckpointError where there are none, or they do not fit.
    """
    if isinstance(source, Encoder):
        own = encoder_of(model, source.intensity)
        # A code of positions that is not learnt follows from the crop.
        positions = {name: value for name, value in own.named_buffers() if name == "pos_embed"}
        _load(own, {**source.state_dict(), **positions}, "the encoder")
        model.train()
        return Beginning("an exported encoder", known=False)
    run = load_run(source)
    _load(model, run.model.state_dict(), str(source))
    scans = read_scans(source)
    return Beginning(str(source), tuple(replace(scan, part=EARLIER) for scan in scans or ()), scans is not None)


def _load(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"--init-from: the weights of {source} do not fit the model of this configuration ({reason}); take the "
            "model options that they were made with"
        ) from error
