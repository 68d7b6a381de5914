"""A run folder with decisions but no checkpoint: its run was killed before step 0 was kept.

The order of writing is stores, scans, first weights, split, configuration, checkpoint: where the configuration is
there, so is the rest. Another start is the same run if all that it finds is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from maesil.cache.catalogue import RUN_STORES
from maesil.cache.provenance import recorded_uses, what_changed
from maesil.config.schema import RunConfig
from maesil.config.toml import asked_for, from_document
from maesil.data.sources import Sources
from maesil.data.split import Split, parts_by_group
from maesil.errors import CheckpointError, UsageError
from maesil.models.encoders import Backbone
from maesil.text import counted
from maesil.training.begin import other_beginning
from maesil.training.resume import ON_RESUME, differences, moved_groups, parts

CONFIG, SPLIT = "config.toml", "split.json"
_NAMED = 4


def begun_before(
    out: Path, config: RunConfig, sources: Sources, split: Split, init_from: Path | Backbone | None, *, go_on: bool
) -> list[str]:
    """Return what is to be said where a run was begun in ``out`` that has no checkpoint; nothing where none was.

    With ``go_on`` (``--resume auto``) another run than that one is refused: CheckpointError says what differs. Without
    it another run may take the place of one that took no step, and is told.
    """
    if not any((out / name).exists() for name in (CONFIG, SPLIT, RUN_STORES)):
        return []
    before, unread = _configuration(out, config)
    changes = list(differences(before, config))
    if config.train.minutes:  # what fits was measured, and is measured again
        changes = [change for change in changes if change[0] != "train.steps"]
    refused = [f"{name}={old}, now {new}" for name, old, new in changes if ON_RESUME[name] == "refused"]
    if len(refused) > _NAMED:
        refused[_NAMED:] = [f"{len(refused) - _NAMED} other options"]
    others = [*refused, *_other_data(out, sources, split), *filter(None, [other_beginning(out, init_from)])]
    begun = f"{out}: a run was begun here and ended before its first checkpoint"
    if others and go_on:
        raise CheckpointError(
            f"{begun}, with {'; '.join(others)}; begin with what it had, or remove {out}, or name another --out"
        )
    if others:
        return [f"{begun}, with {'; '.join(others)}: another run takes its place"]
    applied = [f"changed: {name}={new}, before {old}" for name, old, new in changes if ON_RESUME[name] == "applied"]
    if not (out / RUN_STORES).exists():
        unread = "; ".join(filter(None, (unread, "its stores are not noted")))
    same = f"what it was begun with cannot be compared in full ({unread})" if unread else "it begins again as it was"
    return [f"{begun}: {same}", *applied]


def _configuration(out: Path, config: RunConfig) -> tuple[RunConfig, str]:
    """Return the configuration left there, laid over the one asked for; and why it could not be read, if so."""
    if not (out / CONFIG).exists():
        return config, f"{out / CONFIG} is missing"
    try:
        document = asked_for(out / CONFIG, ())
        document.pop("preset", None)
        return from_document(document, config), "" if document else f"{out / CONFIG} is empty"
    except UsageError as error:
        return config, str(error)


def _other_data(out: Path, sources: Sources, split: Split) -> Iterator[str]:
    """Yield in what stores and split differ from those left there; DamagedError for what was cut short or altered."""
    noted, written = recorded_uses(out), parts_by_group(out / SPLIT) if (out / SPLIT).exists() else {}
    before, now = ({use.fingerprint: use.weight for use in uses} for uses in (noted, sources.uses))
    if before.keys() != now.keys() and noted:
        yield f"other stores ({what_changed(noted, sources.uses) or 'volumes were removed or remade'})"
    elif before != now and noted:
        weights = [", ".join(f"{weight}" for weight in some.values()) for some in (before, now)]
        yield f"store weights {weights[0]}, now {weights[1]}"
    elif written and (moved := moved_groups(written, parts(split))):
        yield f"another split, by which {counted(moved, 'patient group')} would change the part"
