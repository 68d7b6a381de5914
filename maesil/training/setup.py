"""Before the first step: open the stores, split the patients, build or load the model, and say what was decided."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from maesil.cache.provenance import record_uses, spacing_told
from maesil.cache.ram import budget_bytes
from maesil.config.schema import RunConfig
from maesil.config.toml import to_toml
from maesil.data.crops import validation_crops
from maesil.data.intensity import measure_intensity
from maesil.data.sampler import CropSampler
from maesil.data.sources import Sources
from maesil.data.split import Split, read_split, split_patients
from maesil.devices import convolutions_tuned, pick_device, settled
from maesil.distributed import Ranks, current
from maesil.errors import CheckpointError, UsageError
from maesil.kernels import what_triton_lacks
from maesil.models.registry import make_model
from maesil.training.checkpoint import Run, has_checkpoint, load_run, require_resumable, restore_rng
from maesil.training.optim import make_optimizer
from maesil.training.throughput import Pace, flops_per_crop, measure_peak, wait_for
from maesil.training.trainer import Trainer

_WARM_UP_STEPS, _TIMED_STEPS = 3, 12
_TIMED_VISITS = 2
"""Reading comes in visits of several steps; time is taken over whole ones."""


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
    if config.train.kernels == "triton" and (missing := what_triton_lacks(device)):
        lacks = "Triton needs a GPU" if device.type == "cpu" else f"there is {missing}"
        raise UsageError(
            f"train.kernels=triton: {lacks}, training is on {device}; use auto or reference "
            "(with a GPU: pip install 'maesil[gpu]')"
        )
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
    model = settled(model, device)
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
        restore_rng(saved.rng_state, device)
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
    """Return how many steps fit into a time on this machine, by the mean of some that a copy of the trainer takes.

    A step's time is all that passes until the next one begins, waiting for data as well.
    """
    settings = trainer.config.train
    model = copy.deepcopy(trainer.model)
    rehearsal = replace(trainer, model=model, optimizer=make_optimizer(model, settings), averaged=None)
    timed = max(_TIMED_STEPS, _TIMED_VISITS * trainer.sampler.crops_per_visit)
    started = time.monotonic()
    on_gpu = [trainer.device] if trainer.on_gpu else []
    with torch.random.fork_rng(on_gpu), trainer.loader() as loader, convolutions_tuned(model, trainer.device):
        for ready in rehearsal.prepared(loader.batches(0, _WARM_UP_STEPS + timed)):
            rehearsal.training_step(ready)
            if rehearsal.step == _WARM_UP_STEPS:
                wait_for(trainer.device)
                started = time.monotonic()
        rehearsal.read()
    return max(1, int(60 * minutes * timed / (time.monotonic() - started)))


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
