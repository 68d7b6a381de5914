"""What a resumed run may change: one table over all options, and the check that goes by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from maesil.cache.provenance import StoreUse, recorded_uses, what_changed
from maesil.config.schema import MaskConfig, ModelConfig, RunConfig
from maesil.config.toml import to_document
from maesil.data.split import PARTS, Split
from maesil.errors import CheckpointError
from maesil.text import counted
from maesil.training.checkpoint import Run
from maesil.training.optim import Optimizer, learning_rate

Rule = Literal["refused", "applied", "free"]
"""What becomes of another value on resume. ``refused``: an error that names the option. ``applied``: it counts from the
next step on, and is announced. ``free``: it says how the run is carried out, and the losses stay."""


def _train(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys((f"train.{name}" for name in names), rule)


ON_RESUME: dict[str, Rule] = {
    **{f"model.{field.name}": "refused" for field in fields(ModelConfig)},
    **{f"mask.{field.name}": "refused" for field in fields(MaskConfig)},
    **_train("refused", "seed", "batch", "window", "min_body", "thin", "offsets", "crops_per_visit", "flips",
             "window_jitter", "ema", "minutes", "where", "validation", "optimizer", "picture_head_every"),
    **_train("applied", "accumulate", "steps", "lr", "weight_decay", "betas", "warmup", "clip", "validation_crops",
             "log_every", "validate_every", "checkpoint_every", "checkpoint_minutes", "keep_best", "picture_every"),
    **_train("free", "tracker", "compile", "activation_checkpointing", "ram", "stage", "stage_size", "device_resident",
             "readers", "threads", "device", "kernels"),
    "stores": "refused", "weights": "refused", "split": "refused", "init_from": "refused", "profile": "free",
    "mirror": "free",
}  # fmt: skip
"""Every option of a configuration, and those of `maesil.training.train.train` beside it."""

_ADVICE = "resume without changing it, or train anew with another --out"


def require_resumable(
    run: Run, config: RunConfig, store_fingerprints: tuple[str, ...], run_dir: Path, uses: Sequence[StoreUse] = ()
) -> None:
    """Raise CheckpointError unless going on with ``config`` and these stores means going on with the same run.

    ``uses`` is what the stores are now, to say what changed.
    """
    for name, before, now in differences(run.config, config):
        if ON_RESUME[name] == "refused":
            raise CheckpointError(
                f"{run_dir}: the checkpoint was made with {name}={before}, asked for is {now}; {_ADVICE}"
            )
    if config.train.steps < run.step:
        raise CheckpointError(
            f"{run_dir}: {counted(run.step, 'step')} done, asked for is train.steps={config.train.steps}"
        )
    advice = "resume on the stores it was trained on, or train anew with another --out"
    noted = recorded_uses(run_dir)
    if run.store_fingerprints != store_fingerprints:
        changed = what_changed(noted, uses) or "volumes were removed or remade"
        raise CheckpointError(f"{run_dir}: the stores changed since the checkpoint ({changed}); {advice}")
    before, now = ({use.fingerprint: use.weight for use in some} for some in (noted, uses))
    if noted and uses and before != now:
        weights = [", ".join(f"{weight}" for weight in some.values()) for some in (before, now)]
        raise CheckpointError(
            f"{run_dir}: the run was begun with store weights {weights[0]}, asked for is {weights[1]}; {advice}"
        )


def require_same_split(run: Run, given: Split, run_dir: Path) -> None:
    """Raise CheckpointError where another split is asked for than the run began with."""
    moved = moved_groups(parts(run.split), parts(given))
    if moved:
        raise CheckpointError(
            f"{run_dir}: the run was begun with another split, by which {counted(moved, 'patient group')} would change "
            f"the part; {_ADVICE}"
        )


def changes_told(run: Run, config: RunConfig) -> list[str]:
    """Return a line for each thing that a resumed run does differently."""
    told = [
        f"changed from step {run.step + 1} on: {name}={now}, before {before}"
        for name, before, now in differences(run.config, config)
        if ON_RESUME[name] == "applied"
    ]
    before, now = (learning_rate(max(0, run.step - 1), run.config.train), learning_rate(run.step, config.train))
    if run.step and config.train.steps != run.config.train.steps and now > before:
        told.append(f"the learning rate goes up again, from {before:.3g} to {now:.3g}: the schedule is longer now")
    return told


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what an optimiser has gathered, and keep its own settings: those of the configuration that is asked for.

    ``load_state_dict`` alone brings the weight decay and betas of the checkpoint back.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def differences(before: RunConfig, now: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return the options that differ: name, value before, value now."""
    old, new = to_document(before), to_document(now)
    return [
        (f"{section}.{name}", value, new[section][name])
        for section, values in old.items()
        for name, value in values.items()
        if value != new[section][name]
    ]


def parts(split: Split) -> dict[str, str]:
    """Return the part of each patient group; ``train`` for those found to give no crop as the run began."""
    named = {name: getattr(split, name) for name in PARTS}
    named["train"] += split.unused
    return {group: name for name, groups in named.items() for group in groups}


def moved_groups(began: Mapping[str, str], asked: Mapping[str, str]) -> int:
    """Return how many patient groups change the part from one split to another."""
    return sum(began.get(group) != asked.get(group) for group in began.keys() | asked.keys())
