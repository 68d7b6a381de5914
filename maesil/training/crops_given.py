"""Who of the training patients gives crops at all: those who give none are not counted as trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from maesil.config.schema import RunConfig
from maesil.data.sampler import CropSampler
from maesil.data.sources import Sources
from maesil.data.split import Split
from maesil.errors import UsageError
from maesil.text import counted
from maesil.types import MAP_CELL, edges_told

_NAMED = 5


def without_those_of_no_crop(
    split: Split, sources: Sources, sampler: CropSampler, config: RunConfig
) -> tuple[Split, tuple[str, ...]]:
    """Return the split with training patients who give no crop set aside, and a line for each of the first few.

    UsageError with ``train.thin=refuse`` where there are any.
    """
    giving = {volume.group for _, volume in sampler.volumes}
    unused = tuple(group for group in split.train if group not in giving)
    if not unused:
        return split, ()
    told = [_told(group, sources, config) for group in unused[:_NAMED]]
    if config.train.thin == "refuse":
        raise UsageError(
            f"train.thin=refuse: no crop can be cut of {counted(len(unused), 'patient')} to train on: {'; '.join(told)}"
        )
    if len(unused) > _NAMED:
        told.append(f"and {counted(len(unused) - _NAMED, 'patient')} more")
    lines = (f"not trained on, since no crop can be cut: {line}" for line in told)
    return replace(split, train=tuple(group for group in split.train if group in giving), unused=unused), tuple(lines)


def _told(group: str, sources: Sources, config: RunConfig) -> str:
    return f"patient {group[:12]} ({', '.join(_reasons(group, sources, config))})"


def _reasons(group: str, sources: Sources, config: RunConfig) -> Iterator[str]:
    crop = edges_told(config.model.crop)
    for _, volume in sources.volumes([group]):
        size = " x ".join(map(str, volume.shape))
        short = any(n < edge for n, edge in zip(volume.shape, config.model.crop_zyx, strict=True))
        why = f"no crop of {crop} holds a body share of {config.train.min_body}"
        if min(volume.shape) < MAP_CELL:
            why = f"thinner than {MAP_CELL} voxels, so no patch of it would count"
        elif short and config.train.thin != "pad":
            why = f"thinner than a crop of {crop}; train.thin=pad fills it up"
        yield f"volume {volume.volume_id[:8]} of {size} voxels: {why}"
