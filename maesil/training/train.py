"""Training: from stores to a checkpoint, with a loop that reads downward.

What a step sees and does is a function of (configuration, stores, step) alone. After a kill at any moment a resumed
run goes on from its last checkpoint with the losses an undisturbed one would have had, on a CPU to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from maesil.config.schema import RunConfig
from maesil.data.split import Split
from maesil.devices import convolutions_tuned, memory_errors_named
from maesil.distributed import joined
from maesil.kernels import use_kernels
from maesil.signals import interrupts_deferred
from maesil.training.log import NoLog, RunLog
from maesil.training.profiling import profiled
from maesil.training.setup import measure_pace, prepare

_LESS_MEMORY = "raise train.accumulate (the same steps in more parts), or lower train.batch or model.width"


@dataclass(frozen=True)
class TrainSummary:
    """What a run came to."""

    out: Path
    steps: int
    seconds: float
    last: dict[str, float]
    """The last record of ``metrics.jsonl`` that this call wrote; empty if the run was complete already."""


def train(
    stores: Sequence[Path],
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    split: Split | Path | None = None,
    weights: Sequence[float] = (),
    console: Console | None = None,
    profile: bool = False,
) -> TrainSummary:
    """Pre-train a model on the union of ``stores``; leave checkpoint, log and pictures in ``out``.

    Under ``torchrun`` all ranks call it, each takes its share of every step, and the first alone writes and prints.

    ``split`` says which patient groups are trained on and validated on, itself or by its file, in place of the
    configuration's share. ``weights`` are the shares of the crops that each of ``stores`` gives; none: by body.
    With ``resume`` a run that was cut off goes on; its configuration must be the same but for the number of
    steps, the optimiser's values and what does not touch the losses. Raises UsageError, CheckpointError,
    NoInputError, ResourceError, StoreError (damage, at the step that meets it), and KeyboardInterrupt after
    SIGINT or SIGTERM, once the checkpoint is written. ``profile`` traces a few steps, see `maesil.training.profiling`.
    """
    started, last = time.monotonic(), {}
    with joined() as ranks, memory_errors_named(_LESS_MEMORY), use_kernels(config.train.kernels):
        console = (console or Console(stderr=True)) if ranks.first else Console(quiet=True)
        trainer = prepare(stores, config, out, resume=resume, split=split, weights=weights, console=console)
        settings, pace = trainer.config.train, measure_pace(trainer, console)
        with (
            convolutions_tuned(trainer.model, trainer.device),
            RunLog(out, trainer.step, settings.steps, console) if ranks.first else NoLog() as log,
            profiled(out, trainer.device, console) if profile and ranks.first else nullcontext() as profiler,
            trainer.loader() as loader,
            interrupts_deferred() as interrupted,
        ):
            for ready in pace.over(trainer.prepared(loader.batches(trainer.step, settings.steps))):
                trainer.training_step(ready)
                step, end = trainer.step, trainer.step == settings.steps
                if profiler:
                    profiler.step(ready, pace.last_wait)

                validate = bool(trainer.validation) and (end or step % settings.validate_every == 0)
                logged = end or validate or step % settings.log_every == 0
                record = trainer.read() if logged else {}  # waits for the device
                log.show(step, record.get("loss"))
                if logged:
                    record |= pace.record()
                    record |= trainer.validate() if validate else {}
                    log.write(record)
                    last = record
                    pace.restart()
                stop = ranks.any(interrupted.is_set())
                if end or stop or step % settings.checkpoint_every == 0:
                    trainer.read()  # no step that blew up becomes a checkpoint
                    log.sync()
                    if ranks.first:
                        trainer.save(out)
                if ranks.first and (end or (settings.picture_every and step % settings.picture_every == 0)):
                    trainer.draw_picture(out / "pictures" / f"step_{step:07d}.png")
                if stop and not end:
                    console.print(f"interrupted after step {step}; the checkpoint is written, go on with --resume")
                    ranks.any(False)  # the first rank has written it before any other ends
                    raise KeyboardInterrupt
    return TrainSummary(out, trainer.step, time.monotonic() - started, last)
