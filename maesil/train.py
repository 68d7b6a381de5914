"""Training: from stores to a checkpoint, with a loop that reads downward.

What a step sees and does is a function of (configuration, stores, step) alone. After a kill at any moment a resumed
run goes on from its last checkpoint with the losses an undisturbed one would have had, on a CPU to the bit.
"""

from __future__ import annotations

import copy
import json
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from maesil.cache.ram import budget_bytes
from maesil.cache.uses import record_uses, spacing_told
from maesil.checkpoint import Run, has_checkpoint, load_run, require_resumable, restore_rng
from maesil.config import RunConfig
from maesil.config_file import to_toml
from maesil.data import Sources, measure_intensity, validation_crops
from maesil.errors import CheckpointError, ResourceError, UsageError
from maesil.kernels import can_run_triton, use_kernels
from maesil.optim import make_optimizer
from maesil.profiling import profiled
from maesil.ranks import ALONE, Ranks, current, joined
from maesil.runlog import NoLog, RunLog
from maesil.sampler import CropSampler
from maesil.speed import Pace, flops_per_crop, measure_peak
from maesil.split import Split, read_split, split_patients
from maesil.trainer import Trainer
from maesil.zoo import make_model

_WARM_UP_STEPS, _TIMED_STEPS = 3, 12


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
    SIGINT or SIGTERM, once the checkpoint is written. ``profile`` traces a few steps, see `maesil.profiling`.
    """
    started, last = time.monotonic(), {}
    with joined() as ranks, _memory_errors_named(), use_kernels(config.train.kernels):
        console = (console or Console(stderr=True)) if ranks.first else Console(quiet=True)
        trainer = prepare(stores, config, out, resume=resume, split=split, weights=weights, console=console)
        settings, pace = trainer.config.train, measure_pace(trainer, console)
        with (
            RunLog(out, trainer.step, settings.steps, console) if ranks.first else NoLog() as log,
            profiled(out, trainer.device, console) if profile and ranks.first else nullcontext() as profiler,
            trainer.loader() as loader,
            interrupts_deferred() as interrupted,
        ):
            for ready in pace.over(trainer.prepared(loader.batches(trainer.step, settings.steps))):
                record = trainer.training_step(ready)
                step, end = trainer.step, trainer.step == settings.steps
                if profiler:
                    profiler.step(ready, pace.last_wait)
                log.show(step, record["loss"])

                validate = bool(trainer.validation) and (end or step % settings.validate_every == 0)
                if end or validate or step % settings.log_every == 0:
                    record |= pace.record()
                    record |= trainer.validate() if validate else {}
                    log.write(record)
                    last = record
                    pace.restart()
                stop = ranks.any(interrupted.is_set())
                if end or stop or step % settings.checkpoint_every == 0:
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


def prepare(
    stores: Sequence[Path],
    config: RunConfig,
    out: Path,
    *,
    resume: bool,
    console: Console,
    split: Split | Path | None = None,
    weights: Sequence[float] = (),
) -> Trainer:
    """Open the stores, split the patients, measure intensities, build or load the model; write what was decided."""
    ranks = current()
    device = pick_device(config.train.device, ranks)
    if config.train.kernels == "triton" and not can_run_triton(device):
        raise UsageError(f"train.kernels=triton: Triton needs a GPU, training is on {device}; use auto or reference")
    _require_even_shares(config, ranks)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    _require_run_folder(out, resume)
    ram = budget_bytes(config.train.ram, ranks.on_this_machine)
    sources = Sources.open(stores, config.model, where=config.train.where, weights=weights, ram=ram)
    saved = load_run(out, device) if resume and has_checkpoint(out) else None
    if not saved and ranks.first:
        record_uses(out, sources.uses)
    model = make_model(config.model)
    if saved:
        require_resumable(saved, config, sources.fingerprints, out, sources.uses)
        split, intensity = saved.split, saved.intensity
        model.load_state_dict(saved.last_weights)
        if config.train.minutes:  # what fits was decided when the run began
            config = with_steps(config, saved.config.train.steps)
    else:
        split = _split(sources, config, split, console)
        measured = partial(measure_intensity, sources, split.train, config.train.window, config.train.readers)
        intensity = ranks.from_first(measured)
        model.init_weights(torch.Generator().manual_seed(config.train.seed))
        torch.manual_seed(config.train.seed)  # for the codes that a VQ-VAE revives: alike on all ranks
    model = model.to(device)
    trainer = Trainer(
        config=config,
        device=device,
        store_fingerprints=sources.fingerprints,
        split=split,
        intensity=intensity,
        sampler=CropSampler(sources, split.train, config.model.crop, config.train),
        validation=validation_crops(sources, split.validation, config.model.crop, config.train),
        model=model,
        optimizer=make_optimizer(model, config.train),
        averaged=saved.model if saved and config.train.ema else None,
    )
    if config.train.minutes and not saved:
        fitting = steps_that_fit(trainer, config.train.minutes)
        trainer.config = with_steps(config, ranks.from_first(lambda: fitting))
    if saved:
        trainer.step = saved.step
        trainer.optimizer.load_state_dict(saved.optimizer_state)
        restore_rng(saved.rng_state)
        _announce_changes(saved, trainer, console)
    if ranks.first:
        _write_decisions(trainer, out)
    _announce(trainer, console)
    if len(spacings := {spacing_told(use.recipe) for use in sources.uses}) > 1:
        console.print(f"the stores differ in spacing (z, y, x): {', '.join(sorted(spacings))}", highlight=False)
    return trainer


def _split(sources: Sources, config: RunConfig, wanted: Split | Path | None, console: Console) -> Split:
    """Return the split asked for, by itself or by its file, or draw one by the configuration."""
    if isinstance(wanted, Split):
        return wanted
    present = {group: sources.patients[group] for group in sources.groups}
    if wanted is None:
        return split_patients(present, config.train.validation, config.train.seed)
    split, unknown = read_split(wanted, present)
    if unknown:
        console.print(f"{wanted}: {unknown} patients of the stores are not in the split and left out", highlight=False)
    return split


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """Return the configuration with another number of steps."""
    return replace(config, train=replace(config.train, steps=steps))


def steps_that_fit(trainer: Trainer, minutes: float) -> int:
    """Return how many steps fit into a time on this machine: the median of a few, taken by a copy of the trainer."""
    settings = trainer.config.train
    model, rng = copy.deepcopy(trainer.model), torch.get_rng_state()
    rehearsal = replace(trainer, model=model, optimizer=make_optimizer(model, settings), averaged=None)
    seconds = []
    with trainer.loader() as loader:
        for ready in rehearsal.prepared(loader.batches(0, _WARM_UP_STEPS + _TIMED_STEPS)):
            started = time.monotonic()
            rehearsal.training_step(ready)
            seconds.append(time.monotonic() - started)
    torch.set_rng_state(rng)
    return max(1, int(60 * minutes / statistics.median(seconds[_WARM_UP_STEPS:])))


def measure_pace(trainer: Trainer, console: Console) -> Pace:
    """Measure what a step costs and what the device can do, and say so; on the first rank, which logs it."""
    crops, ranks = trainer.config.train.batch, trainer.ranks
    if not ranks.first:
        return Pace(crops, 0.0, 1.0)
    flops = flops_per_crop(trainer, trainer.one_crop())
    peak = measure_peak(trainer.device, torch.get_num_threads())
    console.print(
        f"{flops / 1e9:.4g} GFLOP a superpatch, forward and backward; {peak / 1e12:.3g} TFLOP/s in a large matrix "
        f"product on {trainer.device}, measured now",
        highlight=False,
    )
    return Pace(crops, flops * crops, peak * ranks.count)


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Return the device a configuration names; ``auto`` is the GPU if there is one. UsageError if there is none.

    Each of several ranks on a machine takes a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and ranks.count > 1:
        return _own_gpu(name, ranks)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"train.device={name}: torch sees {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    return device


def _own_gpu(name: str, ranks: Ranks) -> torch.device:
    if name != "cuda":
        raise UsageError(f"train.device={name} on {ranks.count} ranks: each takes a GPU of its own; use cuda or auto")
    if ranks.on_this_machine > torch.cuda.device_count():
        raise UsageError(
            f"{ranks.on_this_machine} ranks on this machine, torch sees {torch.cuda.device_count()} CUDA devices; "
            "start one rank a GPU (torchrun --nproc-per-node gpu)"
        )
    torch.cuda.set_device(ranks.local)
    return torch.device("cuda", ranks.local)


@contextmanager
def interrupts_deferred() -> Iterator[threading.Event]:
    """Let the first SIGINT or SIGTERM set the yielded event, to be looked at between steps; a second one interrupts.

    Outside the main thread, where Python allows no handlers, signals are left as they are.
    """
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _memory_errors_named() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"out of GPU memory; lower train.batch or model.width ({str(error)[:100]})") from error


def _require_run_folder(out: Path, resume: bool) -> None:
    """Refuse to overwrite a run, and to resume what never began."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: expected a folder for the run, found a file; name another --out")
    if resume and not (out / "config.toml").exists():
        raise CheckpointError(f"{out}: nothing to resume, expected a run folder made by `maesil train`")
    if not resume and has_checkpoint(out):
        raise UsageError(f"{out}: holds a run already; go on with --resume, or name another --out")


def _require_even_shares(config: RunConfig, ranks: Ranks) -> None:
    parts = ranks.count * config.train.accumulate
    if config.train.batch % parts:
        raise UsageError(
            f"train.batch={config.train.batch}: expected a multiple of {parts}, for {ranks.count} ranks with "
            f"train.accumulate={config.train.accumulate}; the batch is that of all ranks together"
        )


def _write_decisions(trainer: Trainer, out: Path) -> None:
    """Write ``config.toml`` and ``split.json`` for people; a resumed run reads the checkpoint, not these."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").write_text(to_toml(trainer.config), encoding="utf-8")
    split = {**asdict(trainer.split), "stores": trainer.store_fingerprints}
    (out / "split.json").write_text(json.dumps(split, indent=2) + "\n", encoding="utf-8")


def _announce(trainer: Trainer, console: Console) -> None:
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    patients, held_out = len(trainer.split.train), len(trainer.split.validation)
    ranks = f" by {trainer.ranks.count} ranks" if trainer.ranks.count > 1 else ""
    console.print(
        f"{patients} patients to train on, {held_out} held out ({len(trainer.validation)} crops); "
        f"{parameters / 1e6:.1f} M parameters on {trainer.device}{ranks}; "
        f"step {trainer.step} of {trainer.config.train.steps}",
        highlight=False,
    )
    if not trainer.validation:
        console.print("no validation: nobody is held out, or no crop of theirs holds enough body", highlight=False)


def _announce_changes(saved: Run, trainer: Trainer, console: Console) -> None:
    """Say in one line if the steps to come are dealt out otherwise than those before."""
    before = f"{saved.ranks} ranks in {saved.config.train.accumulate} parts each"
    now = f"{trainer.ranks.count} ranks in {trainer.config.train.accumulate} parts each"
    if before != now:
        console.print(
            f"steps were taken by {before}, now by {now}: each step sees the same crops, masks and noise in the same "
            "order, but its sums are rounded otherwise, so losses will differ in their last digits",
            highlight=False,
        )
