"""Before the first step: open the stores, split the patients, build or load the model, and say what was decided."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from maesil.cache.provenance import record_uses, recorded_uses, spacing_told
from maesil.cache.ram import budget_bytes
from maesil.cache.stage import Stage
from maesil.config.schema import RunConfig, TrainConfig
from maesil.config.toml import to_toml
from maesil.data.crops import validation_crops
from maesil.data.intensity import measure_intensity
from maesil.data.known_scans import record_scans
from maesil.data.sampler import CropSampler
from maesil.data.sources import Sources, reading_threads
from maesil.data.split import Split, read_split, split_patients
from maesil.devices import convolutions_tuned, pick_device, settled
from maesil.distributed import Ranks, current
from maesil.documents import write_json
from maesil.errors import CheckpointError, UsageError
from maesil.files import write_whole
from maesil.kernels import what_triton_lacks
from maesil.models.encoders import Backbone
from maesil.models.latent import USED_FROM_DB
from maesil.models.masked_autoencoder import ReconstructionModel
from maesil.models.registry import make_model
from maesil.sizes import parse_size, size_text
from maesil.store.urls import StorePlace
from maesil.text import counted
from maesil.training.begin import Beginning, beginning, require_same_beginning
from maesil.training.checkpoint import Run, has_checkpoint, load_run, restore_rng
from maesil.training.crops_given import without_those_of_no_crop
from maesil.training.leftover import CONFIG, SPLIT, begun_before
from maesil.training.log import METRICS
from maesil.training.optim import make_optimizer
from maesil.training.resume import changes_told, require_resumable, require_same_split, restore_optimizer
from maesil.training.throughput import Pace, duration_told, flops_per_crop, measure_peak, wait_for
from maesil.training.trainer import Trainer
from maesil.types import Intensity

_WARM_UP_STEPS, _TIMED_STEPS = 3, 12
_TIMED_VISITS = 2
"""Reading comes in visits of several steps; time is taken over whole ones."""


Resume = Literal["auto"] | bool
"""Whether to go on from a checkpoint: it must be there, or (``auto``) where it is there."""


def prepare(
    stores: Sequence[StorePlace],
    config: RunConfig,
    out: Path,
    *,
    resume: Resume,
    console: Console,
    split: Split | Path | None = None,
    weights: Sequence[float] = (),
    init_from: Path | Backbone | None = None,
) -> Trainer:
    """Open the stores, split the patients, measure intensities, build or load the model; write what was decided.

    A run that begins leaves the checkpoint of step 0 at once: from then on a run folder without one is damaged.
    """
    ranks = current()
    device = pick_device(config.train.device, ranks)
    _require_possible(config, device, ranks)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    # Decided by one rank: the checkpoint of step 0 appears while others look.
    saved = load_run(out, device) if ranks.from_first(lambda: _goes_on(out, resume)) else None
    ram = budget_bytes(config.train.ram, ranks.on_this_machine)
    began = recorded_uses(out) if saved or resume == "auto" else ()
    stage = _stage(config.train)
    sources = Sources.open(
        stores, config.model, where=config.train.where, weights=weights, ram=ram, began=began, stage=stage
    )
    asked = _Asked(config, out, device, split, init_from, console, resume)
    trainer = _resumed(saved, sources, asked) if saved else _begun(sources, asked)
    _announce(trainer, console)
    if stage and (stored := sources.stored_bytes) > stage.size:
        console.print(
            f"the stage of {size_text(stage.size)} holds less than the {size_text(stored)} of the stores, so that each "
            "epoch fetches again what went; a larger --stage-size fetches once",
            highlight=False,
        )
    if len(spacings := {spacing_told(use.recipe) for use in sources.uses}) > 1:
        console.print(f"the stores differ in spacing (z, y, x): {', '.join(sorted(spacings))}", highlight=False)
    return trainer


def _stage(config: TrainConfig) -> Stage | None:
    return Stage(Path(config.stage), parse_size(config.stage_size, "train.stage_size")) if config.stage else None


@dataclass(frozen=True)
class _Asked:
    """What a caller asks for."""

    config: RunConfig
    out: Path
    device: torch.device
    split: Split | Path | None
    init_from: Path | Backbone | None
    console: Console
    resume: Resume

    def tell(self, lines: Iterable[str]) -> None:
        """Print lines as they are."""
        for line in lines:
            self.console.print(line, highlight=False)


def _begun(sources: Sources, asked: _Asked) -> Trainer:
    """Return the trainer of a new run, and write what was decided."""
    ranks, config = current(), asked.config
    drawn = _split(sources, config, asked.split, asked.console)
    sampler = CropSampler(sources, drawn.train, config.model.crop, config.train)
    drawn, told = without_those_of_no_crop(drawn, sources, sampler, config)
    before = partial(begun_before, asked.out, config, sources, drawn, asked.init_from, go_on=asked.resume == "auto")
    told = (*ranks.from_first(before), *_growth_told(sources, asked.out), *told)
    threads = reading_threads(sources.readers, config.train.readers)
    measured = partial(measure_intensity, sources, drawn.train, config.train.window, threads)
    intensity, model = ranks.from_first(measured), make_model(config.model)
    model.init_weights(torch.Generator().manual_seed(config.train.seed))
    begins = Beginning() if asked.init_from is None else beginning(asked.init_from, model)
    asked.tell([*told, *begins.told(drawn)])
    torch.manual_seed(config.train.seed)  # for the codes that a VQ-VAE revives: alike on all ranks
    trainer = _trainer(sources, asked, config, model, sampler, drawn, intensity)
    if config.train.minutes:
        fitting = steps_that_fit(trainer, config.train.minutes)
        trainer.config = with_steps(config, ranks.from_first(lambda: fitting))
    if ranks.first:
        record_uses(asked.out, sources.uses)
        record_scans(asked.out, sources.stores, drawn, begins.scans)
        begins.record(asked.out)
        _write_decisions(trainer, asked.out)
        trainer.save(asked.out)
    return trainer


def _resumed(saved: Run, sources: Sources, asked: _Asked) -> Trainer:
    """Return the trainer of a run that goes on from its checkpoint."""
    config, out = asked.config, asked.out
    if config.train.minutes:  # what fits was decided when the run began
        config = with_steps(config, saved.config.train.steps)
    require_resumable(saved, config, sources.fingerprints, out, sources.uses)
    if asked.init_from is not None:
        asked.tell([require_same_beginning(out, asked.init_from)])
    if asked.split is not None:
        require_same_split(saved, _split(sources, config, asked.split, asked.console), out)
    model = make_model(config.model)
    model.load_state_dict(saved.last_weights)
    sampler = CropSampler(sources, saved.split.train, config.model.crop, config.train)
    trainer = _trainer(sources, asked, config, model, sampler, saved.split, saved.intensity)
    trainer.step = saved.step
    if config.train.ema:
        trainer.averaged = saved.model
    restore_optimizer(trainer.optimizer, saved.optimizer_state)
    restore_rng(saved.rng_state, asked.device)
    asked.tell([*_growth_told(sources, out), *changes_told(saved, config), *_ranks_told(saved, trainer)])
    if current().first:
        _write_decisions(trainer, out)
    return trainer


def _trainer(
    sources: Sources,
    asked: _Asked,
    config: RunConfig,
    model: ReconstructionModel,
    sampler: CropSampler,
    split: Split,
    intensity: Intensity,
) -> Trainer:
    model = settled(model, asked.device)
    return Trainer(
        config=config,
        device=asked.device,
        store_fingerprints=sources.fingerprints,
        split=split,
        intensity=intensity,
        sampler=sampler,
        validation=validation_crops(sources, split.validation, config.model.crop, config.train),
        model=model,
        optimizer=make_optimizer(model, config.train),
    )


def _split(sources: Sources, config: RunConfig, wanted: Split | Path | None, console: Console) -> Split:
    """Return the split asked for, by itself or by its file, or draw one by the configuration."""
    if isinstance(wanted, Split):
        return wanted
    present = {group: sources.patients[group] for group in sources.groups}
    if wanted is None:
        return split_patients(present, config.train.validation, config.train.seed)
    split, unknown = read_split(wanted, present)
    if unknown:
        console.print(
            f"{wanted}: {counted(unknown, 'patient')} of the stores not in the split and left out", highlight=False
        )
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
        f"{flops / 1e9:.4g} GFLOP per crop, forward and backward; {peak / 1e12:.3g} TFLOP/s in a large matrix "
        f"product on {trainer.device}, measured now",
        highlight=False,
    )
    pace = Pace(crops, flops * crops, peak * ranks.count)
    left = trainer.config.train.steps - trainer.step
    work = f"{counted(left, 'step')} of {counted(crops, 'crop')}"
    console.print(f"{work}: {duration_told(pace.least_seconds(left))} or more, at that peak", highlight=False)
    return pace


def warn_of_unused_encoder(record: dict[str, float], config: RunConfig, console: Console) -> None:
    """Say so where the score of a masked model does not hang on its encoder; ``record`` is the last of the run."""
    mean, mixed = record["encoder_gain_db"], record["encoder_gain_shuffled_db"]
    if config.mask.kind != "none" and min(mean, mixed) < USED_FROM_DB:
        other_head = "" if config.model.head == "linear" else ", or with model.head=linear"
        console.print(
            f"warning: the encoder is not used. The held-out score falls by {mean:.2f} dB when its tokens are replaced "
            f"by their mean, by {mixed:.2f} dB when they are shuffled. Features of this encoder will be poor; train "
            f"longer{other_head}",
            highlight=False,
        )


def _goes_on(out: Path, resume: Resume) -> bool:
    """Return whether a run goes on from its checkpoint; refuse to overwrite a run, and to resume what never began."""
    if has_checkpoint(out):
        if not resume:
            raise UsageError(f"{out}: holds a run already; go on with --resume, or name another --out")
        return True
    metrics = out / METRICS
    if metrics.exists() and metrics.stat().st_size:
        raise CheckpointError(
            f"{out}: expected the checkpoint beside the metrics of a run, found none: it was removed; bring it back, "
            "or name another --out"
        )
    if resume and resume != "auto":
        raise CheckpointError(
            f"{out}: nothing to resume, expected a run folder made by `maesil train`; --resume auto begins where there "
            "is none"
        )
    return False


def _require_possible(config: RunConfig, device: torch.device, ranks: Ranks) -> None:
    """Raise UsageError for what this device or so many ranks cannot do."""
    if config.train.kernels == "triton" and (missing := what_triton_lacks(device)):
        lacks = "Triton needs a GPU" if device.type == "cpu" else f"there is {missing}"
        raise UsageError(
            f"train.kernels=triton: {lacks}, training is on {device}; use auto or reference "
            "(with a GPU: pip install 'maesil[gpu]')"
        )
    parts = ranks.count * config.train.accumulate
    if config.train.batch % parts:
        raise UsageError(
            f"train.batch={config.train.batch}: expected a multiple of {parts}, for {ranks.count} ranks with "
            f"train.accumulate={config.train.accumulate}; the batch is that of all ranks together"
        )


def _write_decisions(trainer: Trainer, out: Path) -> None:
    """Write ``split.json`` and ``config.toml`` for people; a resumed run reads the checkpoint, not these.

    The configuration comes last: a run that ends before its first checkpoint is known by it (`begun_before`).
    """
    write_json(out / SPLIT, {**asdict(trainer.split), "stores": trainer.store_fingerprints})
    write_whole(out / CONFIG, to_toml(trainer.config))


def _announce(trainer: Trainer, console: Console) -> None:
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    patients, held_out = len(trainer.split.train), len(trainer.split.validation)
    ranks = f" by {trainer.ranks.count} ranks" if trainer.ranks.count > 1 else ""
    crops = counted(len(trainer.validation), "crop")
    console.print(
        f"{counted(patients, 'patient')} to train on, {held_out} held out ({crops}); "
        f"{parameters / 1e6:.1f} M parameters on {trainer.device}{ranks}; "
        f"step {trainer.step} of {trainer.config.train.steps}",
        highlight=False,
    )
    if not trainer.validation:
        console.print("no validation: nobody is held out, or no crop of theirs holds enough body", highlight=False)


def _growth_told(sources: Sources, out: Path) -> list[str]:
    """Say that the stores hold more than the run trains on."""
    if not sources.left_out:
        return []
    return [
        f"the stores have grown by {counted(sources.left_out, 'volume')}: training goes on with those it began with; "
        f"--init-from {out} begins a new run on all of them"
    ]


def _ranks_told(saved: Run, trainer: Trainer) -> list[str]:
    """Say in one line if the steps to come are dealt out otherwise than those before."""
    before = f"{counted(saved.ranks, 'rank')} in {counted(saved.config.train.accumulate, 'part')} each"
    now = f"{counted(trainer.ranks.count, 'rank')} in {counted(trainer.config.train.accumulate, 'part')} each"
    if before == now:
        return []
    return [
        f"steps were taken by {before}, now by {now}: each step sees the same crops, masks and noise in the same "
        "order, but its sums are rounded otherwise, so losses will differ in their last digits"
    ]
