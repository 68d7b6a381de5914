"""The card of an exported encoder: all that is needed to use its weights, for programs (JSON) and people (Markdown).

No path and no patient is in it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maesil.config.schema import AS_BEFORE, RunConfig
from maesil.config.toml import from_document, to_document
from maesil.documents import read_json
from maesil.errors import CheckpointError, UsageError
from maesil.evaluation.metrics import Region
from maesil.evaluation.scores import SCORES, PaperTable, Scores, number_told
from maesil.store.recipe import Recipe
from maesil.text import counted
from maesil.training.checkpoint import CHECKPOINT
from maesil.types import AIR_HU, Edges, Intensity, Spacing, zyx
from maesil.version import __version__

CARD = "config.json"
_OLD_CARD = "card.json"
FORMAT, VERSION = "maesil-encoder", 1
_PAPER = "arXiv 2604.00514"
NO_LICENCE = (
    "Not stated by whoever exported it. The program is Apache-2.0; these weights were made from other people's scans, "
    "and the terms of those data sets apply."
)


@dataclass(frozen=True)
class Weights:
    """The file of weights that a card vouches for."""

    file: str
    sha256: str
    tensors: int


class ScoresOfStore(Scores, total=False):
    """A row of ``maesil evaluate`` without what does not apply, and the store that it is of."""

    model: str
    table: PaperTable
    region: Region
    mask: str
    window: list[float]
    volumes: int
    store_fingerprint: str


@dataclass(frozen=True)
class Card:
    """What is known of an exported encoder."""

    config: RunConfig
    intensity: Intensity
    width: int
    """Numbers of a token."""
    steps_done: int
    patients: int
    """How many patient groups it was trained on."""
    store_fingerprints: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    """Of those stores, as far as they are known."""
    scores: tuple[ScoresOfStore, ...]
    """What these very weights scored, each row with the fingerprint of the store; empty where nobody evaluated them."""
    weights: Weights
    licence: str = NO_LICENCE
    maesil: str = __version__
    """The version that exported it."""

    @property
    def spacing(self) -> Spacing | None:
        """The spacing (mm) of all voxels it was trained on; None where they differ or nobody knows."""
        return one_spacing(self.recipes)

    def document(self) -> dict[str, Any]:
        """Return ``config.json``; its keys are told in ``docs/reference/files.md``."""
        config, model = to_document(self.config), self.config.model
        recipes = [{"hash": recipe.hash, **recipe.document()} for recipe in self.recipes]
        return {
            "format": FORMAT,
            "version": VERSION,
            "maesil": self.maesil,
            "paper": _PAPER,
            "model": config["model"],
            "input": {
                "dtype": "int16", "unit": "HU", "axes": "B Z Y X (to the head, to the back, to the left)",
                "outside_scan_hu": AIR_HU, "edge_voxels": model.crop, "patch_voxels": model.patch,
                "spacing_zyx_mm": [recipe["spacing_zyx_mm"] for recipe in recipes],
            },
            "output": {"tokens": model.tokens, "width": self.width, "order": "(iz * gy + iy) * gx + ix"},
            "architecture": {"heads": model.heads, "layer_norm_eps": 1e-6, "activation": "gelu"},
            "intensity": {
                "window_hu": list(self.intensity.window), "mean": self.intensity.mean, "std": self.intensity.std
            },
            "training": {
                "mask": config["mask"], "train": config["train"], "steps_done": self.steps_done,
                "patients": self.patients,
            },
            "stores": {"fingerprints": list(self.store_fingerprints), "recipes": recipes},
            "scores": list(self.scores),
            "licence": self.licence,
            "weights": asdict(self.weights),
        }  # fmt: skip

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Card:
        """Return the card that `document` describes; KeyError, TypeError, ValueError or UsageError for what is none."""
        training, stores = document["training"], document["stores"]
        sections = {"model": document["model"], "mask": training["mask"], "train": training["train"]}
        low, high = document["intensity"]["window_hu"]
        intensity = Intensity((low, high), document["intensity"]["mean"], document["intensity"]["std"])
        if not (0 < intensity.std < math.inf and low < high):
            raise ValueError(f"an intensity of {document['intensity']}")
        return cls(
            config=from_document(sections, AS_BEFORE),
            intensity=intensity,
            width=document["output"]["width"],
            steps_done=training["steps_done"],
            patients=training["patients"],
            store_fingerprints=tuple(stores["fingerprints"]),
            recipes=tuple(map(Recipe.from_document, stores["recipes"])),
            scores=tuple(document["scores"]),
            weights=_weights(document["weights"]),
            licence=document["licence"],
            maesil=document["maesil"],
        )

    def page(self) -> str:
        """Return the card for people, in Markdown."""
        model, (lo, hi) = self.config.model, self.intensity.window
        spacing = "; ".join(str(recipe.document()["spacing_zyx_mm"]) for recipe in self.recipes) or "not recorded"
        lines = [
            *_front_matter(self.licence),
            f"# Encoder of kind {model.kind}, made by maesil {self.maesil} ({_PAPER})", "",
            f"* Input: int16 HU `[B, Z, Y, X]`, {_crop_told(model.crop)} voxels, spacing z, y, x (mm): {spacing};"
            f" {AIR_HU} outside the scan",
            f"* Output: one token of {self.width} numbers for each {_patch_told(model.patch)} voxels",
            f"* A value is ((clip(HU, {lo:g}, {hi:g}) - {lo:g}) / {hi - lo:g} - {self.intensity.mean:.6g}) / "
            f"{self.intensity.std:.6g}",
            f"* Trained for {counted(self.steps_done, 'step')} on {counted(self.patients, 'patient')}, mask "
            f"`{self.config.mask.kind}`",
            *[f"* Store fingerprint `{fingerprint}`" for fingerprint in self.store_fingerprints],
            *[f"* Recipe `{recipe.hash}`" for recipe in self.recipes],
            f"* Licence: {self.licence}",
            f"* Please cite {_PAPER}" + (" and Primus (arXiv 2503.01835)" if model.kind == "primus" else ""), "",
            "    encoder = maesil.load_encoder(DIR)  # or USER/NAME on the Hugging Face Hub",
            "    embedding = encoder.embed(maesil.read_ct(SCAN, encoder.preprocess.spacing))", "",
            _score_table(self.scores),
        ]  # fmt: skip
        return "\n".join(lines).rstrip() + "\n"


def _weights(document: Mapping[str, Any]) -> Weights:
    weights = Weights(**document)
    if Path(weights.file).name != weights.file:
        raise ValueError(f"a file of weights beside the card, {weights.file!r}")
    return weights


def one_spacing(recipes: Iterable[Recipe]) -> Spacing | None:
    """Return the spacing (mm) that all recipes share; None where there is none such."""
    found = {recipe.spacing for recipe in recipes}
    return found.pop() if len(found) == 1 else None


def is_export(folder: Path) -> bool:
    """Return whether a folder was made by ``maesil export``."""
    return card_of(folder) is not None


def card_of(folder: Path) -> Path | None:
    """Return where the card of an exported encoder lies, whole or not; None in any other folder."""
    if (folder / _OLD_CARD).exists():
        return folder / _OLD_CARD
    try:
        document = json.loads((folder / CARD).read_bytes())
    except OSError:
        return None
    except ValueError:
        return folder / CARD  # cut short, most likely
    # Many programs write a file of this name.
    ours = isinstance(document, dict) and document.get("format") == FORMAT
    return folder / CARD if ours else None


def read_card(folder: Path) -> Card:
    """Return the card of an exported encoder; CheckpointError if there is none, DamagedError if it was altered."""
    path = card_of(folder)
    if path is None:
        is_run = (folder / CHECKPOINT).exists() or (folder / "config.toml").exists()
        found = f"a run; export its encoder first: maesil export {folder} --out DIR" if is_run else f"no {CARD} of one"
        raise CheckpointError(f"{folder}: expected a folder made by `maesil export`, found {found}")
    document = read_json(path)
    found = f"{document.get('format')} {document.get('version')}"
    if found != f"{FORMAT} {VERSION}":
        raise CheckpointError(f"{path}: expected the card of an encoder ({FORMAT} {VERSION}), found {found}")
    try:
        return Card.from_document(document)
    except (KeyError, TypeError, AttributeError, ValueError, UsageError) as error:
        raise CheckpointError(f"{path}: expected the card of an encoder, found it incomplete ({error!r})") from error


def _front_matter(licence: str) -> list[str]:
    """Return what the Hugging Face Hub reads of a card: the licence, if it is one that it knows, and tags."""
    word = re.sub(r"[ ./_-]+", "-", licence.strip().lower())
    known = next((name for name in _HUB_LICENCES if re.sub(r"[.]", "-", name) == word), None)
    named = [f"license: {known}"] if known else ["license: other", "license_name: see-below"]
    return ["---", *named, "library_name: maesil", "pipeline_tag: image-feature-extraction",
            "tags: [ct, medical, 3d, masked-autoencoder]", "---", ""]  # fmt: skip


_HUB_LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")


def _crop_told(crop: Edges) -> str:
    return f"cubes of {crop}" if isinstance(crop, int) else f"crops of {' x '.join(map(str, zyx(crop)))} (z, y, x)"


def _patch_told(patch: Edges) -> str:
    return f"{patch}^3" if isinstance(patch, int) else f"{' x '.join(map(str, zyx(patch)))} (z, y, x)"


def _score_table(scores: Sequence[ScoresOfStore]) -> str:
    if not scores:
        return "Not evaluated: run `maesil evaluate` before `maesil export`."
    shown = [name for name in SCORES if any(name in row for row in scores)]
    head = ["model", "region", *shown, "volumes"]
    rows = [
        [str(row.get("model", "-")), str(row.get("region", "-")), *(number_told(row.get(name), 3) for name in shown),
         str(row.get("volumes", "-"))]
        for row in scores
    ]  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
