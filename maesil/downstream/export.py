"""Handing an encoder on: a folder of weights (safetensors) with a card, and the way back.

``DIR/encoder.safetensors`` holds the encoder's weights alone, under the names of `maesil.models.encoders`;
``DIR/card.json`` all that is needed to use them, ``DIR/README.md`` the same for people. No path and no patient is in
it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from maesil.cache.provenance import recorded_uses
from maesil.config.schema import AS_BEFORE
from maesil.config.toml import from_document, to_document
from maesil.documents import fields_of, read_json, write_json
from maesil.errors import CheckpointError, UsageError
from maesil.evaluation.scores import SCORES
from maesil.files import make_folder, write_whole
from maesil.models.encoders import Encoder, encoder_of
from maesil.models.registry import make_model
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.text import counted
from maesil.training.checkpoint import CHECKPOINT, Run, load_run
from maesil.types import Intensity
from maesil.version import __version__

CARD = "card.json"
WEIGHTS = "encoder.safetensors"
FORMAT, VERSION = "maesil-encoder", 1


def export_encoder(
    run_dir: Path, out: Path, *, stores: Sequence[Path] = (), licence: str = "", force: bool = False
) -> Encoder:
    """Write a run's encoder to a new folder: weights, ``card.json``, ``README.md``.

    ``stores`` are needed only for the recipe of runs that do not keep it. ``licence`` is said on the card as it is.
    ``force`` replaces an earlier export. Raises CheckpointError, StoreError, and UsageError where ``out`` holds
    something else.
    """
    run = load_run(run_dir)
    if is_export(out) and not force:
        raise UsageError(f"{out}: holds an exported encoder already; name another --out, or --force to replace it")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CARD).exists())):
        raise UsageError(f"{out}: expected a new folder or an exported encoder, found other files; name another --out")
    recipes, scores = _recipes_of(run_dir, run.store_fingerprints, stores), _scores(run_dir, run)
    encoder = encoder_of(run.model, run.intensity)
    make_folder(out)
    state = {name: value.detach().contiguous() for name, value in encoder.state_dict().items()}
    (out / CARD).unlink(missing_ok=True)  # no card vouches for weights that are being replaced
    write_whole(out / WEIGHTS, save(state, metadata={"format": FORMAT, "version": str(VERSION)}))
    card = _card(run, encoder, recipes, scores, licence)
    card["weights"] = {"file": WEIGHTS, "sha256": _sha256(out / WEIGHTS), "tensors": len(state)}
    write_json(out / CARD, card)
    write_whole(out / "README.md", _markdown(card))
    return encoder


def load_encoder(folder: Path | str, device: torch.device | str = "cpu") -> Encoder:
    """Load an exported encoder: a module whose ``forward_features`` takes int16 HU ``[B, Z, Y, X]``.

    It gives tokens ``[B, L, D]``, float32 unless autocast says otherwise; window and normalisation are inside (see
    `maesil.models.encoders.Encoder`). The module is in evaluation mode. CheckpointError for what is no whole export,
    DamagedError for a card that was altered.
    """
    folder = Path(folder)
    card = read_card(folder)
    try:
        config = from_document({"model": card["model"]}, AS_BEFORE).model
        window = card["intensity"]["window_hu"]
        intensity = Intensity((window[0], window[1]), card["intensity"]["mean"], card["intensity"]["std"])
        expected = card["weights"]["sha256"]
        if not (0 < intensity.std < math.inf and window[0] < window[1]):
            raise ValueError(f"an intensity of {card['intensity']}")
    except (KeyError, TypeError, IndexError, ValueError, UsageError) as error:
        raise CheckpointError(
            f"{folder / CARD}: expected the card of an encoder, found it incomplete ({error!r})"
        ) from error
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(f"{folder / WEIGHTS}: expected the weights beside their card, found none; export again")
    if _sha256(folder / WEIGHTS) != expected:
        raise CheckpointError(f"{folder / WEIGHTS}: expected the weights that the card vouches for, found others")
    encoder = encoder_of(make_model(config), intensity)
    try:
        encoder.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: its weights do not have the shapes its card says ({reason})") from error
    return encoder.to(device)


def is_export(folder: Path) -> bool:
    """Return whether a folder was made by ``maesil export``."""
    return (folder / CARD).exists()


def read_card(folder: Path) -> dict[str, Any]:
    """Return ``card.json`` of an exported encoder; CheckpointError if there is none, DamagedError."""
    path = folder / CARD
    try:
        card = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        is_run = (folder / CHECKPOINT).exists() or (folder / "config.toml").exists()
        found = f"a run; export its encoder first: maesil export {folder} --out DIR" if is_run else f"no {CARD}"
        raise CheckpointError(f"{folder}: expected a folder made by `maesil export`, found {found}") from error
    found = f"{card.get('format')} {card.get('version')}"
    if found != f"{FORMAT} {VERSION}":
        raise CheckpointError(f"{path}: expected the card of an encoder ({FORMAT} {VERSION}), found {found}")
    return card


def _card(
    run: Run, encoder: Encoder, recipes: list[dict[str, Any]], scores: list[dict[str, Any]], licence: str
) -> dict[str, Any]:
    config = to_document(run.config)
    return {
        "format": FORMAT,
        "version": VERSION,
        "maesil": __version__,
        "paper": "arXiv 2604.00514",
        "model": config["model"],
        "input": {
            "dtype": "int16", "unit": "HU", "axes": "B Z Y X (to the head, to the back, to the left)",
            "outside_scan_hu": -1024, "edge_voxels": run.config.model.crop, "patch_voxels": run.config.model.patch,
            "spacing_zyx_mm": [recipe["spacing_zyx_mm"] for recipe in recipes],
        },
        "output": {"tokens": run.config.model.tokens, "width": encoder.width, "order": "(iz * gy + iy) * gx + ix"},
        "architecture": {"heads": run.config.model.heads, "layer_norm_eps": 1e-6, "activation": "gelu"},
        "intensity": {"window_hu": list(run.intensity.window), "mean": run.intensity.mean, "std": run.intensity.std},
        "training": {"mask": config["mask"], "train": config["train"], "steps_done": run.step,
                     "patients": len(run.split.train)},
        "stores": {"fingerprints": list(run.store_fingerprints), "recipes": recipes},
        "scores": scores,
        "licence": licence or _NO_LICENCE,
    }  # fmt: skip


_NO_LICENCE = (
    "Not stated by whoever exported it. The program is Apache-2.0; these weights were made from other people's scans, "
    "and the terms of those data sets apply."
)


def _scores(run_dir: Path, run: Run) -> list[dict[str, Any]]:
    """Return the rows of the last ``maesil evaluate``, naive baselines too, if it scored these very weights."""
    path = run_dir / "evaluation" / "scores.json"
    found = read_json(path) if path.exists() else {}
    if found.get("weights_sha256") != run.weights_sha256():
        return []
    kept = ("model", "table", "region", "mask", "window", "volumes", *SCORES)
    with fields_of(path):
        of_store = {"store_fingerprint": found["store_fingerprint"]}
        return [{name: row[name] for name in kept if row.get(name) is not None} | of_store for row in found["rows"]]


def _markdown(card: dict[str, Any]) -> str:
    model, intensity = card["model"], card["intensity"]
    lo, hi = intensity["window_hu"]
    spacing = "; ".join(map(str, card["input"]["spacing_zyx_mm"])) or "not recorded"
    lines = [
        f"# Encoder of kind {model['kind']}, made by maesil {card['maesil']} ({card['paper']})", "",
        f"* Input: int16 HU `[B, Z, Y, X]`, {_box_told(model['crop'])} voxels, spacing z, y, x (mm): {spacing};"
        f" {card['input']['outside_scan_hu']} outside the scan",
        f"* Output: one token of {card['output']['width']} numbers for each {_patch_told(model['patch'])} voxels",
        f"* A value is ((clip(HU, {lo:g}, {hi:g}) - {lo:g}) / {hi - lo:g} - {intensity['mean']:.6g}) / "
        f"{intensity['std']:.6g}",
        f"* Trained for {counted(card['training']['steps_done'], 'step')} on "
        f"{counted(card['training']['patients'], 'patient')}, mask "
        f"`{card['training']['mask']['kind']}`",
        *[f"* Store fingerprint `{fingerprint}`" for fingerprint in card["stores"]["fingerprints"]],
        *[f"* Recipe `{recipe['hash']}`" for recipe in card["stores"]["recipes"]],
        f"* Licence: {card['licence']}", "",
        "    encoder = maesil.load_encoder(DIR)",
        "    tokens = encoder.forward_features(volume_int16)", "",
        _score_table(card["scores"]),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _box_told(crop: int | list[int]) -> str:
    return f"cubes of {crop}" if isinstance(crop, int) else f"crops of {' x '.join(map(str, crop))} (z, y, x)"


def _patch_told(patch: int | list[int]) -> str:
    return f"{patch}^3" if isinstance(patch, int) else f"{' x '.join(map(str, patch))} (z, y, x)"


def _score_table(scores: list[dict[str, Any]]) -> str:
    if not scores:
        return "Not evaluated: run `maesil evaluate` before `maesil export`."
    shown = [name for name in SCORES if any(name in row for row in scores)]
    head = ["model", "region", *shown, "volumes"]
    rows = [[str(row.get(name, "-")) if not isinstance(row.get(name), float) else f"{row[name]:.3f}" for name in head]
            for row in scores]  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _recipes_of(run_dir: Path, fingerprints: Sequence[str], stores: Sequence[Path] = ()) -> list[dict[str, Any]]:
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
    documents = [store.recipe.document() for store in opened] or [use.recipe for use in recorded_uses(run_dir)]
    by_hash = {Recipe.from_document(document).hash: document for document in documents}
    return [{"hash": name, **document} for name, document in sorted(by_hash.items())]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
