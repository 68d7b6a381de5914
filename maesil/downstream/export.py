"""Handing an encoder on: a folder of weights (safetensors) with a card (`maesil.downstream.card`), and the way back.

``DIR/model.safetensors`` holds the encoder's weights alone, under the names of `maesil.models.encoders`;
``DIR/config.json``, its card, all that is needed to use them, ``DIR/README.md`` the same for people. No path and no
patient is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save

from maesil.cache.provenance import recorded_uses
from maesil.config.checks import require_known
from maesil.documents import fields_of, read_json, write_json
from maesil.downstream.bundle import BUNDLE, bundle_files
from maesil.downstream.card import (
    CARD,
    FORMAT,
    NO_LICENCE,
    VERSION,
    Card,
    ScoresOfStore,
    Weights,
    card_of,
    is_export,
    read_card,
)
from maesil.downstream.nnunet import CHECKPOINT, PLAN, nnunet_files
from maesil.downstream.program import PROGRAM, program_files
from maesil.errors import CheckpointError, UsageError
from maesil.evaluation.scores import SCORES
from maesil.files import make_folder, write_whole
from maesil.models.encoders import Backbone, encoder_of
from maesil.models.registry import make_model
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.training.checkpoint import Run, load_run

WEIGHTS = "model.safetensors"

_BESIDE: dict[str, Callable[[Backbone, Card], dict[str, bytes]]] = {
    "maesil": lambda encoder, card: {},
    "nnunet": lambda encoder, card: nnunet_files(encoder, card.spacing),
    "pt2": lambda encoder, card: program_files(encoder),
    "monai-bundle": bundle_files,
}
"""What each format has beside weights and card: files by their names below the folder."""
FORMATS = tuple(_BESIDE)
_FILES_BESIDE = (CHECKPOINT, PLAN, PROGRAM, *BUNDLE)


def export_encoder(
    run_dir: Path,
    out: Path,
    *,
    stores: Sequence[StorePlace] = (),
    licence: str = "",
    force: bool = False,
    kind: str = "maesil",
) -> Backbone:
    """Write a run's encoder to a new folder: weights, ``config.json``, ``README.md``.

    ``stores`` are needed only for the recipe of runs that do not keep it. ``licence`` is said on the card as it is.
    ``force`` replaces an earlier export. ``kind`` is one of `FORMATS`: ``maesil``, or a format that has other files
    besides (`maesil.downstream.nnunet`, `maesil.downstream.program`, `maesil.downstream.bundle`). Raises
    CheckpointError, StoreError, and UsageError where ``out`` holds something else or there is no such format of the
    encoder; then nothing is written.
    """
    require_known(kind, list(FORMATS), "format of an export")
    run = load_run(run_dir)
    if is_export(out) and not force:
        raise UsageError(f"{out}: holds an exported encoder already; name another --out, or --force to replace it")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not is_export(out))):
        raise UsageError(f"{out}: expected a new folder or an exported encoder, found other files; name another --out")
    recipes, scores = _recipes_of(run_dir, run.store_fingerprints, stores), _scores(run_dir, run)
    encoder = encoder_of(run.model, run.intensity)
    content, weights = _packed(encoder)
    card = Card(
        run.config, run.intensity, encoder.width, run.step, len(run.split.train), run.store_fingerprints,
        recipes, scores, weights, licence or NO_LICENCE,
    )  # fmt: skip
    beside = _BESIDE[kind](encoder, card)
    make_folder(out)
    _replace_weights(out, content)
    for name, data in beside.items():
        make_folder((out / name).parent)
        write_whole(out / name, data)
    write_card(out, card)
    return encoder


def write_weights(out: Path, encoder: Backbone) -> Weights:
    """Write the weights of an encoder to a folder, and say what a card is to vouch for."""
    content, weights = _packed(encoder)
    _replace_weights(out, content)
    return weights


def _packed(encoder: Backbone) -> tuple[bytes, Weights]:
    """Return the file of the weights, and what a card vouches for."""
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    # One entry: several come in another order each time, and equal weights shall be equal files.
    content = save(state, metadata={"format": f"{FORMAT} {VERSION}"})
    return content, Weights(WEIGHTS, hashlib.sha256(content).hexdigest(), len(state))


def _replace_weights(out: Path, content: bytes) -> None:
    """Write weights to a folder, without a card that vouches for others and files that were made of others."""
    (card_of(out) or out / CARD).unlink(missing_ok=True)
    for name in _FILES_BESIDE:
        (out / name).unlink(missing_ok=True)
    write_whole(out / WEIGHTS, content)


def write_card(out: Path, card: Card) -> None:
    """Write the card of an encoder, for programs and for people."""
    write_json(out / CARD, card.document())
    write_whole(out / "README.md", card.page())


def load_net(folder: Path | str, device: torch.device | str = "cpu") -> Backbone:
    """Load an exported encoder: a module whose ``forward_features`` takes int16 HU ``[B, Z, Y, X]``.

    It gives tokens ``[B, L, D]``, float32 unless autocast says otherwise; window and normalisation are inside (see
    `maesil.models.encoders.Backbone`). The module is in evaluation mode. CheckpointError for what is no whole export,
    DamagedError for a card that was altered.
    """
    folder = Path(folder)
    card = read_card(folder)
    weights = folder / card.weights.file
    if not weights.exists():
        raise CheckpointError(f"{weights}: expected the weights beside their card, found none; export again")
    if _sha256(weights) != card.weights.sha256:
        raise CheckpointError(f"{weights}: expected the weights that the card vouches for, found others")
    encoder = encoder_of(make_model(card.config.model), card.intensity)
    try:
        encoder.load_state_dict(load_file(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: its weights do not have the shapes its card says ({reason})") from error
    return encoder.to(device)


def _scores(run_dir: Path, run: Run) -> tuple[ScoresOfStore, ...]:
    """Return the rows of the last ``maesil evaluate``, naive baselines too, if it scored these very weights."""
    path = run_dir / "evaluation" / "scores.json"
    found = read_json(path) if path.exists() else {}
    if found.get("weights_sha256") != run.weights_sha256():
        return ()
    kept = ("model", "table", "region", "mask", "window", "volumes", *SCORES)
    with fields_of(path):
        of_store = {"store_fingerprint": found["store_fingerprint"]}
        return tuple(
            cast(ScoresOfStore, {name: row[name] for name in kept if row.get(name) is not None} | of_store)
            for row in found["rows"]
        )


def _recipes_of(run_dir: Path, fingerprints: Sequence[str], stores: Sequence[StorePlace] = ()) -> tuple[Recipe, ...]:
    """Return the recipes of the stores that a run was trained on, as its ``stores.json`` notes them; none without it.

    ``stores`` stand in for that file; UsageError for one that the run was not trained on.
    """
    opened = [Store.open(path) for path in stores]
    for store in opened:
        if store.fingerprint not in fingerprints:
            known = ", ".join(fingerprint[:12] for fingerprint in fingerprints)
            raise UsageError(
                f"{store.path}: expected a store that {run_dir} was trained on (fingerprint {known}), found "
                f"{store.fingerprint[:12]}; leave --store out, or name that store"
            )
    recipes = [store.recipe for store in opened] or [use.recipe for use in recorded_uses(run_dir)]
    return tuple(recipe for _, recipe in sorted({recipe.hash: recipe for recipe in recipes}.items()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
