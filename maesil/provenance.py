"""What the stores of a run were made by, kept beside the run so that its weights can be told what they were fed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maesil.errors import UsageError
from maesil.store import Store
from maesil.whole_file import write_whole

RECIPES = "recipes.json"


def write_recipes(run_dir: Path, stores: Sequence[Path]) -> None:
    """Write ``RUN/recipes.json``: the recipe of each store, without repetitions."""
    write_whole(run_dir / RECIPES, json.dumps(_distinct(Store.open(path) for path in stores), indent=1) + "\n")


def recipes_of(run_dir: Path, fingerprints: Sequence[str], stores: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Return the recipes of the stores that a run was trained on; empty where the run is older than this file.

    ``stores`` stand in for it; UsageError for one that the run was not trained on.
    """
    opened = [Store.open(path) for path in stores]
    for store in opened:
        if store.fingerprint not in fingerprints:
            known = ", ".join(fingerprint[:12] for fingerprint in fingerprints)
            raise UsageError(
                f"{store.path}: expected a store that {run_dir} was trained on (fingerprint {known}), found "
                f"{store.fingerprint[:12]}; leave --store out, or name that store"
            )
    if opened:
        return _distinct(opened)
    path = run_dir / RECIPES
    recipes: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return recipes


def _distinct(stores: Any) -> list[dict[str, Any]]:
    by_hash = {store.recipe_hash: {"hash": store.recipe_hash, **store.recipe.document()} for store in stores}
    return [recipe for _, recipe in sorted(by_hash.items())]
