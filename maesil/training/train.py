"""Training: from stores to a checkpoint, with a loop that reads downward.

What a step sees and does is a function of (configuration, stores, step) alone. After a kill at any moment a resumed
run goes on from its last checkpoint with the losses an undisturbed one would have had, on a CPU to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from maesil.config.schema import RunConfig, TrackerName
from maesil.data.split import Split
from maesil.devices import convolutions_tuned, memory_errors_named
from maesil.distributed import joined
from maesil.files import folder_locked
from maesil.installed import EVENTS, PICTURES, not_installed
from maesil.kernels import use_kernels
from maesil.models.encoders import Backbone, HasNet
from maesil.signals import interrupts_deferred, interrupts_raised
from maesil.store.urls import StorePlace
from maesil.training.checkpoint import has_checkpoint
from maesil.training.follow import follow
from maesil.training.kept import Kept
from maesil.training.log import NoLog, Record, RunLog
from maesil.training.mirror import Mirror, bring_back
from maesil.training.profiling import profiled
from maesil.training.setup import Resume, measure_pace, prepare, warn_of_unused_encoder
from maesil.training.throughput import Pace
from maesil.training.trackers import require_tracker
from maesil.training.trainer import Trainer

_LESS_MEMORY = (
    "set train.activation_checkpointing=true (slower, the same losses) or raise train.accumulate (the same steps in "
    "more parts), or lower train.batch or model.width"
)


@dataclass(frozen=True)
class TrainSummary:
    """What a run came to."""

    out: Path
    steps: int
    """Done in all."""
    seconds: float
    """Of this call."""
    last: dict[str, float]
    """The last record of ``metrics.jsonl`` that this call wrote; empty if the run was complete already."""
    begun_at: int = 0
    """Steps that were done before this call."""
    held_out: int = 0
    """Patient groups that were not trained on."""


def train(
    stores: Sequence[StorePlace],
    config: RunConfig,
    out: Path,
    *,
    resume: Resume = False,
    split: Split | Path | None = None,
    weights: Sequence[float] = (),
    init_from: Path | Backbone | HasNet | None = None,
    console: Console | None = None,
    profile: bool = False,
    note: str = "",
    mirror: StorePlace | None = None,
) -> TrainSummary:
    """Pre-train a model on the union of ``stores``; leave checkpoint, log and pictures in ``out``.

    Under ``torchrun`` all ranks call it, each takes its share of every step, and the first alone writes and prints.

    ``split`` says which patient groups are trained on and validated on, itself or by its file, in place of the
    configuration's share. ``weights`` are the shares of the crops that each of ``stores`` gives; none: by body.
    With ``resume`` a run that was cut off goes on (``auto``: or begins, where there is none); what may change then
    stands in `maesil.training.resume.ON_RESUME`. ``init_from`` is a run, or what `maesil.load_encoder`
    gives, whose weights a new run begins with; a run that goes on takes its checkpoint, and other weights than those it
    began with are refused. Raises UsageError, CheckpointError, NoInputError, ResourceError, StoreError (damage,
    at the step that meets it), and KeyboardInterrupt, with a line that says how to go on, after a signal that asks for
    an end (`maesil.signals.ENDS`), once the checkpoint is written. ``profile`` traces a few steps, see
    `maesil.training.profiling`. ``note`` is a line on the configuration, said once the run is set up.
    ``mirror`` is a second place of the run, see `maesil.training.mirror`.
    """
    started = time.monotonic()
    require_tracker(config.train.tracker)
    weights_from = init_from.net if isinstance(init_from, HasNet) else init_from
    with (
        _interrupts_told(out), joined() as ranks, interrupts_raised(), memory_errors_named(_LESS_MEMORY),
        use_kernels(config.train.kernels),
    ):  # fmt: skip
        console = (console or Console(stderr=True, soft_wrap=True)) if ranks.first else Console(quiet=True)
        with folder_locked(out, "`maesil train`") if ranks.first else nullcontext():
            brought = ranks.from_first(lambda: bring_back(mirror, out, resume=bool(resume)) if mirror else "")
            trainer = prepare(
                stores,
                config,
                out,
                resume=resume,
                split=split,
                weights=weights,
                init_from=weights_from,
                console=console,
            )
            begun_at = trainer.step
            for line in (brought, note, *_left_out(config.train.tracker)):
                if line:
                    console.print(line, highlight=False)
            last = _take_steps(trainer, out, console, profile, mirror) if begun_at < trainer.config.train.steps else {}
    held_out = len(trainer.split.validation) + len(trainer.split.test)
    return TrainSummary(out, trainer.step, time.monotonic() - started, last, begun_at, held_out)


def _take_steps(
    trainer: Trainer, out: Path, console: Console, profile: bool, mirror: StorePlace | None
) -> dict[str, float]:
    """Take the steps that are left; return the last record."""
    ranks, last = trainer.ranks, {}
    settings, pace = trainer.config.train, measure_pace(trainer, console)
    tell = partial(console.print, highlight=False)
    kept = Kept(out, trainer, Mirror(mirror, out, tell).copy) if mirror and ranks.first else Kept(out, trainer)
    with (
        convolutions_tuned(trainer.model, trainer.device),
        _log(trainer, out, console) as log,
        profiled(out, trainer.device, console) if profile and ranks.first else nullcontext() as profiler,
        trainer.loader() as loader,
        interrupts_deferred(_ENDS_SOON if ranks.first else "") as interrupted,
    ):
        for ready in pace.over(trainer.prepared(loader.batches(trainer.step, settings.steps))):
            trainer.training_step(ready)
            step, end = trainer.step, trainer.step == settings.steps
            if profiler:
                profiler.step(ready, pace.last_wait)

            validate = bool(trainer.validation) and (end or step % settings.validate_every == 0)
            record: Record = {}
            if end or validate or step % settings.log_every == 0:
                last = record = _measured(trainer, pace, console, validate=validate, end=end)
                log.write(record)
                pace.restart()
            log.show(step, record.get("loss"))  # after a validation, so that its score is this step's
            if ranks.first and validate:
                kept.write_if_best(record["validation_psnr"])  # first: a resumed run takes it for written
            stop = ranks.any(interrupted.is_set())
            if end or stop or kept.due():
                trainer.read()  # no step that blew up becomes a checkpoint
                log.sync()
                kept.write()
            pictured = end or (settings.picture_every and step % settings.picture_every == 0)
            if ranks.first and pictured and not not_installed(PICTURES):
                trainer.draw_picture(out / "pictures" / f"step_{step:07d}.png")
            if stop and not end:
                ranks.any(False)  # the first rank has written it before any other ends
                raise KeyboardInterrupt(
                    f"interrupted after step {step}; the checkpoint is written, go on with --resume"
                )
    return last


def _measured(trainer: Trainer, pace: Pace, console: Console, *, validate: bool, end: bool) -> Record:
    """Return the record of a step, which waits for the device; with scores of the held-out crops if asked to."""
    record = trainer.read() | pace.record()
    if validate:
        record |= trainer.validate()
        if end:
            record |= trainer.encoder_gains()
            warn_of_unused_encoder(record, trainer.config, console)
    return record


def _log(trainer: Trainer, out: Path, console: Console) -> RunLog | NoLog:
    """Return the log of a run, which its tracker follows; that of other ranks than the first writes nothing."""
    if not trainer.ranks.first:
        return NoLog()
    follower = follow(trainer, out, console)  # first: the log cuts off the metrics that the tracker knows
    return RunLog(out, trainer.step, trainer.config.train.steps, console, follower)


def _left_out(tracker: TrackerName) -> Iterator[str]:
    """Say what this run will not leave, for want of a package."""
    wanted = [("no pictures", PICTURES)] + [("no log for TensorBoard", EVENTS)] * (tracker == "tensorboard")
    for what, modules in wanted:
        if missing := not_installed(modules):
            yield f"{what}: {missing} is not installed"


_ENDS_SOON = "asked to end: the checkpoint follows after this step; ask again to end at once, without it"


@contextmanager
def _interrupts_told(out: Path) -> Iterator[None]:
    """Let an interrupt at any other moment say how to go on, too."""
    try:
        yield
    except KeyboardInterrupt as error:
        if error.args:
            raise
        told = "the last checkpoint stays, go on with --resume"
        if not has_checkpoint(out):
            told = "no step was taken yet, so begin again with the same command"
        raise KeyboardInterrupt(f"interrupted; {told}") from error
