"""What a run notes of the stores it was trained on, to say later what became of them: ``RUN/stores.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maesil.cache.catalogue import RUN_STORES, entry_of
from maesil.documents import fields_of, read_json, write_json
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.urls import place_of


@dataclass(frozen=True)
class StoreUse:
    """One store as a run found it."""

    path: str
    name: str | None
    """In the catalogue, if it is there."""
    weight: float | None
    fingerprint: str
    recipe: Recipe
    volumes: dict[str, tuple[str, str]]
    """Source hash and patient group of each volume."""

    def document(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {**vars(self), "recipe": self.recipe.document()}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> StoreUse:
        """Return the use that `document` describes."""
        volumes = {name: (source_hash, group) for name, (source_hash, group) in document["volumes"].items()}
        return cls(**{**document, "recipe": Recipe.from_document(document["recipe"]), "volumes": volumes})


def use_of(store: Store, weight: float | None) -> StoreUse:
    """Return how a store is now."""
    volumes = {volume.volume_id: (volume.source_hash, volume.group) for volume in store.volumes()}
    path = store.path.resolve()
    entry = entry_of(path)
    return StoreUse(str(path), entry.name if entry else None, weight, store.fingerprint, store.recipe, volumes)


def record_uses(run: Path, uses: Sequence[StoreUse]) -> None:
    """Write ``RUN/stores.json``, and pin those stores that are in the catalogue."""
    write_json(run / RUN_STORES, {"stores": [use.document() for use in uses]})
    for use in uses:
        if (entry := entry_of(place_of(use.path))) is not None:
            entry.pin(run, use.fingerprint)
            entry.touch()


def recorded_uses(run: Path) -> tuple[StoreUse, ...]:
    """Return what a run noted, nothing where it noted nothing; DamagedError."""
    path = run / RUN_STORES
    if not path.is_file():
        return ()
    document = read_json(path)
    with fields_of(path):
        return tuple(map(StoreUse.from_document, document["stores"]))


def same_or_grown(before: Sequence[StoreUse], now: Sequence[StoreUse]) -> tuple[int, ...] | None:
    """Return, for each store as it was, the number of the one that holds all of its volumes unchanged.

    None where a store is without such a one, or there are others besides.
    """
    if len(before) != len(now):
        return None
    left, found = list(range(len(now))), []
    for old in before:
        holding = [n for n in left if old.recipe == now[n].recipe and old.volumes.items() <= now[n].volumes.items()]
        if not holding:
            return None
        found.append(min(holding, key=lambda n: (now[n].fingerprint != old.fingerprint, now[n].path != old.path)))
        left.remove(found[-1])
    return tuple(found)


def notes_on_spacing(run: Path, store: Store) -> tuple[str, ...]:
    """Return a note where a run was trained at other spacings than a store has; none where the run noted nothing."""
    trained = {spacing_told(use.recipe) for use in recorded_uses(run)}
    here = spacing_told(store.recipe)
    if not trained or here in trained:
        return ()
    before = " and ".join(sorted(trained))
    return (
        f"{run} was trained on voxels of {before}, {store.path} holds voxels of {here}: organs have another size in "
        "voxels, so expect worse results; a store with the spacing of the run compares fairly",
    )


def spacing_told(recipe: Recipe) -> str:
    """Return the spacing of a recipe in words (z, y, x)."""
    return "native spacing" if recipe.spacing is None else " x ".join(f"{mm:g}" for mm in recipe.spacing) + " mm"


def what_changed(before: Sequence[StoreUse], now: Sequence[StoreUse]) -> str:
    """Return in words what sets the stores of a run apart from those at hand; empty where nothing was noted."""
    then = {use.path: use for use in before}
    told = []
    for use in now:
        old = then.pop(use.path, None)
        if old is None:
            same = next((path for path, other in then.items() if other.fingerprint == use.fingerprint), None)
            if same is None and before:
                told.append(f"{use.path} was not among its stores")
            then.pop(same or "", None)
        elif old.fingerprint != use.fingerprint:
            told.append(f"{use.name or use.path}: {_difference(old, use)}")
    return "; ".join([*told, *(f"{path} is missing" for path in then)])


def _difference(old: StoreUse, new: StoreUse) -> str:
    parts = []
    if old.recipe != new.recipe:
        then, now = old.recipe.document(), new.recipe.document()
        names = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
        parts.append(f"another recipe ({', '.join(names)})")
    shared = old.volumes.keys() & new.volumes.keys()
    counts = {
        "added": len(new.volumes.keys() - old.volumes.keys()),
        "removed": len(old.volumes.keys() - new.volumes.keys()),
        "rebuilt from a changed source": sum(old.volumes[v][0] != new.volumes[v][0] for v in shared),
        "of another patient group": sum(old.volumes[v][1] != new.volumes[v][1] for v in shared),
    }
    parts += [f"{count} {'volume' if count == 1 else 'volumes'} {what}" for what, count in counts.items() if count]
    return ", ".join(parts)
