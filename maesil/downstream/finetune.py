"""Does pre-training help? Segmentation from a pre-trained encoder, and from scratch with the same budget.

Both start with the same decoder, see the same crops in the same order for the same number of steps, and differ in the
encoder's first weights alone. Scored are patients that were neither learnt from nor pre-trained on; with one labelled
patient, the middle block of it.
"""

from __future__ import annotations

import copy
import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import save
from torch import Tensor

from maesil.cache.provenance import notes_on_spacing
from maesil.config.schema import ModelConfig, require_tile
from maesil.data.crops import read_crop
from maesil.data.known_scans import EARLIER, known_scans
from maesil.devices import pick_device
from maesil.documents import write_json
from maesil.downstream.folds import patients_of
from maesil.downstream.labels import UNLABELLED, LabelArray, Labels, load_labels
from maesil.downstream.segmenter import DiceSums, Segmenter, segmentation_loss
from maesil.downstream.tasks import Place, Task, choose_task
from maesil.errors import MaesilError, UsageError
from maesil.files import make_folder, write_whole
from maesil.models.encoders import Backbone, encoder_of, untrained_encoder
from maesil.progress import progress
from maesil.store.grid import box_at
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.training.checkpoint import Run, load_run
from maesil.training.optim import learning_rate, set_learning_rate
from maesil.types import MAP_CELL, Edges, Zyx, edges_told, zyx

STARTS = ("pretrained", "scratch")
SHARE_WITH_CLASS = 1 / 3
"""Of the crops: as many are drawn among those that hold a class, as in nnU-Net. A lesion fills few crops of a scan."""


@dataclass(frozen=True)
class FinetuneBudget:
    """How long and how fast; the same for both starts."""

    steps: int = 300
    batch: int = 2
    lr: float = 3e-3
    """The highest learning rate."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises to it; then it falls to 0 along a cosine."""
    seeds: int = 2
    """Repetitions: decoder, order of crops and weights from scratch are drawn anew."""
    half_resolution: bool = False
    """Whether the decoder works on cells of two voxels, see `maesil.downstream.segmenter.Segmenter`."""


Dice = TypedDict("Dice", {"volume_id": str, "class": str, "dice": float | None})
"""How well a class is found in a volume; None where neither labels nor prediction hold it."""


class DiceOfStart(Dice):
    """A row of the report: the Dice, by which start and with which seed."""

    start: str
    seed: int


class FinetuneFacts(TypedDict):
    """What a fine-tuning was made of."""

    store_fingerprint: str
    classes: list[str]
    budget: dict[str, int | float | bool]
    seed: int
    volumes_trained_on: int
    volumes_scored: int


@dataclass(frozen=True)
class FinetuneReport:
    """What fine-tuning came to."""

    rows: list[DiceOfStart]
    """One a start, seed, volume and class."""
    classes: tuple[str, ...]
    facts: FinetuneFacts
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {**self.facts, "notes": list(self.notes), "mean": self.means(), "rows": self.rows}

    def means(self) -> dict[str, dict[str, float | None]]:
        """Return Dice by start and class, mean over volumes and seeds; ``mean`` over classes."""
        found: dict[str, dict[str, float | None]] = {}
        for start in STARTS:
            by_class = {
                name: _mean([r["dice"] for r in self._rows(start) if r["class"] == name]) for name in self.classes
            }
            found[start] = {**by_class, "mean": _mean(list(by_class.values()))}
        return found

    def spread(self, start: str) -> float:
        """Return the standard deviation, over seeds, of the mean Dice."""
        seeds = sorted({row["seed"] for row in self.rows})
        means = [_mean([row["dice"] for row in self._rows(start) if row["seed"] == seed]) for seed in seeds]
        known = [one for one in means if one is not None]
        return float(np.std(known, ddof=1)) if len(known) > 1 else math.nan

    def table(self) -> list[Any]:
        """Return the table and the notes for people."""
        table = Table(title="Dice, mean over volumes and seeds", title_justify="left")
        for name in ("class", *STARTS):
            table.add_column(name, justify="left" if name == "class" else "right")
        means = self.means()
        for name in (*self.classes, "mean"):
            values = [means[start][name] for start in STARTS]
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            if name == "mean":
                spreads = [self.spread(start) for start in STARTS]
                cells = [f"{c} ± {s:.3f}" if math.isfinite(s) else c for c, s in zip(cells, spreads, strict=True)]
            table.add_row(name, *cells)
        return [table, *self.notes]

    def _rows(self, start: str) -> list[DiceOfStart]:
        return [row for row in self.rows if row["start"] == start]


def finetune(
    run_dir: Path,
    store_path: StorePlace,
    labels_dir: Path,
    out: Path,
    *,
    budget: FinetuneBudget | None = None,
    classes: Sequence[str] = (),
    test: float = 0.25,
    seed: int = 0,
    device: str = "auto",
    include_trained: bool = False,
) -> FinetuneReport:
    """Fine-tune a run's encoder and its untrained twin; write ``finetune.json`` and weights to ``out``.

    ``test`` is the share of the unseen labelled patients that is scored. ``out/segmenter.safetensors`` holds the
    weights of the pre-trained start with the first seed (`maesil.downstream.segmenter.Segmenter`). Raises
    CheckpointError, StoreError, NoInputError (no labels, nothing to train on), UsageError (labels that do not fit,
    nobody to score).
    """
    budget, on = budget or FinetuneBudget(), pick_device(device)
    _require_possible(budget, test)
    run, store = load_run(run_dir, on), Store.open(store_path)
    config = run.config.model
    require_tile(config, store.superpatch, store.path)
    require_power_of_2(run_dir, config)
    reader = SuperpatchReader(store)
    make_folder(out)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        labels = load_labels(labels_dir, store.volumes(), Path(scratch), classes)
        known = known_scans([run_dir])
        leaders, unchecked = known.patients(store)
        trained_on = {*run.split.train, *known.groups("train", EARLIER)}
        patients = patients_of(leaders, labels.volumes, trained_on, seed, include_trained=include_trained)
        task = choose_task(reader, labels, patients, config.crop, test, seed)
        rows, first = _compare(run, reader, labels, task, budget, seed)
    facts = _facts(store, labels, task, budget, seed)
    notes = (task.told, *labels.notes, *unchecked, *notes_on_spacing(run_dir, store))
    notes += (*(_OPTIMISTIC,) * include_trained, *_rare(rows, labels.classes))
    found = FinetuneReport(rows, labels.classes, facts, notes)
    write_whole(out / "segmenter.safetensors", first)
    write_json(out / "finetune.json", found.document())
    return found


def _require_possible(budget: FinetuneBudget, test: float) -> None:
    if not 0 < budget.lr < math.inf:
        raise UsageError(f"--lr: expected a number above 0, found {budget.lr:g}")
    if not 0 < test < 1:
        raise UsageError(f"--test: expected a share of the patients between 0 and 1, found {test:g}")


def _facts(store: Store, labels: Labels, task: Task, budget: FinetuneBudget, seed: int) -> FinetuneFacts:
    return {
        "store_fingerprint": store.fingerprint,
        "classes": list(labels.classes),
        "budget": vars(budget),
        "seed": seed,
        "volumes_trained_on": len({place.volume.volume_id for place in task.train}),
        "volumes_scored": len({place.volume.volume_id for place in task.test}),
    }


def require_power_of_2(run_dir: Path, config: ModelConfig) -> None:
    """Raise UsageError for patches that the decoder cannot double its way to."""
    if any(edge.bit_count() != 1 for edge in config.patch_zyx):
        raise UsageError(f"{run_dir}: expected model.patch to be a power of 2, found {edges_told(config.patch)}")


_OPTIMISTIC = "patients that the encoder was pre-trained on may be scored (--include-trained): optimistic"


def _rare(rows: Sequence[Dice], classes: Sequence[str]) -> Iterator[str]:
    """Note the classes that are scored in a single volume, where others are scored too."""
    volumes = {row["volume_id"] for row in rows}
    for name in classes:
        having = {row["volume_id"] for row in rows if row["class"] == name and row["dice"] is not None}
        if len(having) == 1 < len(volumes):
            yield f"{name} is scored in one of the {len(volumes)} volumes alone: says little of new patients"


def _compare(
    run: Run, reader: SuperpatchReader, labels: Labels, task: Task, budget: FinetuneBudget, seed: int
) -> tuple[list[DiceOfStart], bytes]:
    """Train and score both starts for every seed; return the scores, and the weights of the first."""
    device = next(run.model.parameters()).device
    turns = [(seed + number, start) for number in range(budget.seeds) for start in STARTS]
    rows: list[DiceOfStart] = []
    first = b""
    with progress({"finetune": "step"}) as report:
        for turn, (number, start) in enumerate(turns):
            model = _start(run, start, len(labels.classes), number, budget).to(device)
            for step in train_segmenter(model, reader, labels, task, budget, number):
                report("finetune", turn * budget.steps + step, len(turns) * budget.steps)
            scored = score_segmenter(model, reader, labels, task.test)
            rows += [{"start": start, "seed": number, **row} for row in scored]
            if turn == 0:
                state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
                first = save(state)
    return rows, first


def _start(run: Run, start: str, classes: int, seed: int, budget: FinetuneBudget) -> Segmenter:
    """Make a segmenter: the decoder by its seed, the encoder as the start says."""
    if start == "pretrained":
        encoder = copy.deepcopy(encoder_of(run.model, run.intensity))
    else:
        encoder = untrained_encoder(run.config.model, run.intensity, seed)
    return segmenter_on(encoder, classes, seed, budget)


def segmenter_on(encoder: Backbone, classes: int, seed: int, budget: FinetuneBudget) -> Segmenter:
    """Put a decoder on an encoder, its weights drawn by the seed alone; ``classes`` without the background."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = Segmenter(encoder, classes + 1, half_resolution=budget.half_resolution)
    torch.set_rng_state(state)
    return model


def train_segmenter(
    model: Segmenter, reader: SuperpatchReader, labels: Labels, task: Task, budget: FinetuneBudget, seed: int
) -> Iterator[int]:
    """Train what is not frozen of encoder and decoder, yielding the number of steps done.

    A third of the crops is drawn among those that hold a class. AdamW; the learning rate of each step is that of
    training (`maesil.training.optim.learning_rate`).
    """
    device = next(model.parameters()).device
    learnt = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=budget.lr, weight_decay=0.01)
    crop = model.encoder.config.crop
    with_class = [place for place in task.train if _holds_class(place, labels, crop)]
    model.train()
    for step in range(budget.steps):
        set_learning_rate(optimizer, learning_rate(step, budget))
        hu, truth = _batch(reader, labels, _draw(task.train, with_class, seed, step, budget.batch), crop)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(hu.to(device))
        loss = segmentation_loss(logits.float(), truth.to(device))
        value = loss.item()
        if not math.isfinite(value):
            raise MaesilError(f"fine-tuning step {step + 1}: the loss is {value}; lower --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        yield step + 1


def _holds_class(place: Place, labels: Labels, crop: Edges) -> bool:
    truth = _labels_of_crop(labels.of(place.volume), place.origin, crop)
    return bool(((truth > 0) & (truth != UNLABELLED)).any())


def _draw(places: Sequence[Place], with_class: Sequence[Place], seed: int, step: int, batch: int) -> list[Place]:
    """Draw the crops of a step by (seed, step) alone."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    pools = [with_class if chosen and with_class else places for chosen in rng.random(batch) < SHARE_WITH_CLASS]
    return [pool[int(rng.integers(len(pool)))] for pool in pools]


def _batch(reader: SuperpatchReader, labels: Labels, places: Sequence[Place], crop: Edges) -> tuple[Tensor, Tensor]:
    """Read crops: int16 HU and uint8 labels ``[B, Z, Y, X]``; outside the scan nothing is labelled."""
    read = [read_crop(reader, place.volume.volume_id, place.origin, crop) for place in places]
    truths = []
    for place, one in zip(places, read, strict=True):
        truth = _labels_of_crop(labels.of(place.volume), place.origin, crop)
        inside = one.valid > 0
        for axis in range(3):
            inside = inside.repeat(MAP_CELL, axis=axis)
        truths.append(np.where(inside, truth, np.uint8(UNLABELLED)))
    return torch.from_numpy(np.stack([one.hu for one in read])), torch.from_numpy(np.stack(truths))


def _labels_of_crop(labels: LabelArray, origin: Zyx, crop: Edges) -> LabelArray:
    out = np.full(zyx(crop), UNLABELLED, np.uint8)
    part = labels[box_at(origin, crop)]
    out[tuple(slice(0, n) for n in part.shape)] = part
    return out


def score_segmenter(model: Segmenter, reader: SuperpatchReader, labels: Labels, places: Sequence[Place]) -> list[Dice]:
    """Return the Dice of each class in each volume, pooled over its crops."""
    rows: list[Dice] = []
    for volume, predicted, truth in segmented(model, reader, labels, places):
        sums = DiceSums(len(labels.classes))
        sums.add(predicted, truth)
        pairs = zip(labels.classes, sums.dice, strict=True)
        rows += [{"volume_id": volume.volume_id, "class": name, "dice": dice} for name, dice in pairs]
    return rows


@torch.no_grad()
def segmented(
    model: Segmenter, reader: SuperpatchReader, labels: Labels, places: Sequence[Place]
) -> Iterator[tuple[Volume, Tensor, Tensor]]:
    """Yield each volume with what the model finds in it and what its labels say, uint8 ``[Z, Y, X]``.

    What lies in none of the places, beyond the scan or where no label reaches is 255 in both.
    """
    device, crop = next(model.parameters()).device, model.encoder.config.crop
    model.eval()
    by_volume: dict[str, list[Place]] = {}
    for place in places:
        by_volume.setdefault(place.volume.volume_id, []).append(place)
    for of_volume in by_volume.values():
        volume = of_volume[0].volume
        predicted, truth = (torch.full(volume.shape, UNLABELLED, dtype=torch.uint8) for _ in range(2))
        for place in of_volume:
            hu, known = _batch(reader, labels, [place], crop)
            found = model(hu.to(device)).argmax(dim=1).to(torch.uint8).cpu()
            box = box_at(place.origin, crop)
            inside = tuple(slice(0, n) for n in truth[box].shape)
            truth[box] = known[0][inside]
            predicted[box] = found[0][inside].masked_fill(truth[box] == UNLABELLED, UNLABELLED)
        yield volume, predicted, truth


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
