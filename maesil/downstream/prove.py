"""Does this encoder help? One command, one page: a frozen encoder and a trained one beside controls, on labelled scans.

What is finished lies as sealed JSON in ``OUT/parts`` and is not made again. Nothing is scored before it is known that
no encoder was trained on a scored scan. Protocol: ``docs/how-to/does-it-help.md``.
"""

from __future__ import annotations

import hashlib
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maesil.cache.provenance import notes_on_spacing
from maesil.config.checks import require_known
from maesil.config.schema import require_tile
from maesil.devices import pick_device
from maesil.documents import as_json, fields_of, read_json, write_json
from maesil.downstream.adapters import load_adapter
from maesil.downstream.cohort import PARTS, Cohort, Part, choose_cohort
from maesil.downstream.few_shot import Course, Lesson, learn, numbers_of_patients, starts_of
from maesil.downstream.findings import chance, findings, limits
from maesil.downstream.finetune import FinetuneBudget, require_power_of_2
from maesil.downstream.labels import Labels, load_labels
from maesil.downstream.presence import look_at_crops, score_presence
from maesil.downstream.probe import encoders_of, look_at
from maesil.downstream.prove_page import Proof, write_page
from maesil.downstream.retrieval import score_other_scan, score_retrieval
from maesil.downstream.scored import Row, Rows
from maesil.downstream.shares import score_shares
from maesil.downstream.surface import has_surface_dice
from maesil.errors import UsageError
from maesil.files import make_folder
from maesil.models.encoders import Backbone
from maesil.progress import progress
from maesil.store.reader import SuperpatchReader
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.training.checkpoint import Run, load_run


@dataclass(frozen=True)
class ProofBudget:
    """One section of ``prove.toml``."""

    name: str
    patches: int
    patients: tuple[int, ...]
    steps: int
    batch: int
    lr: float
    seeds: int
    points: int
    tolerance_mm: float
    half_resolution: bool

    @classmethod
    def load(cls, name: str) -> ProofBudget:
        """Read a budget; UsageError for a name that is none."""
        budgets = tomllib.loads((files("maesil.downstream") / "prove.toml").read_text("utf-8"))
        require_known(name, list(budgets), "budget")
        return cls(name, **{**budgets[name], "patients": tuple(budgets[name]["patients"])})

    def learnt_from(self, patients: Sequence[int]) -> ProofBudget:
        """Return the budget with other numbers of patients (0: all); UsageError for one that learns nothing."""
        if patients and not self.steps:
            raise UsageError(f"--patients: the budget {self.name} learns no segmentation; name another --budget")
        return replace(self, patients=tuple(patients) or self.patients)

    @property
    def learning(self) -> FinetuneBudget:
        """What a segmentation may cost."""
        return FinetuneBudget(self.steps, self.batch, self.lr, seeds=self.seeds, half_resolution=self.half_resolution)


def prove(
    run_dir: Path,
    store_path: StorePlace,
    labels_dir: Path,
    out: Path,
    *,
    budget: ProofBudget | None = None,
    part: str = "validation",
    split_file: Path | None = None,
    also: Sequence[Path] = (),
    adapters: Sequence[str] = (),
    classes: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    include_trained: bool = False,
) -> Proof:
    """Score a run's encoder, controls and other encoders; write ``prove.json`` and ``index.html`` to ``out``.

    ``also`` are other runs (an AE, say), ``adapters`` functions as of `maesil.downstream.adapters`. Equal arguments
    give equal rows on one machine, interrupted or not. Raises CheckpointError, StoreError, NoInputError (no labels),
    UsageError (a scored scan that was trained on, another proof in ``out``, labels that do not fit, nobody to score).
    """
    require_known(part, list(PARTS), "part")
    chosen: Part = "test" if part == "test" else "validation"
    budget, on, store = budget or ProofBudget.load("tiny"), pick_device(device), Store.open(store_path)
    runs = {path: load_run(path, on) for path in (run_dir, *also)}
    run = runs[run_dir]
    require_tile(run.config.model, store.superpatch, store.path)
    require_power_of_2(run_dir, run.config.model)
    cohort = choose_cohort(store, labels_dir, runs, chosen, split_file, seed, include_trained=include_trained)
    encoders = _encoders(list(runs), adapters, run, seed, on)
    make_folder(out)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        labels = load_labels(labels_dir, cohort.volumes(), Path(scratch), classes)
        made_from = {
            "budget": vars(budget), "part": chosen, "seed": seed, "store": store.fingerprint,
            "runs": [one.weights_sha256() for one in runs.values()], "adapters": list(adapters),
            "classes": list(labels.classes), "labels_sha256": _hash_of(labels),
            "patients_learnt_from": list(cohort.learnt), "patients_scored": list(cohort.scored),
            "device": on.type, "surface_dice": has_surface_dice(),
        }  # fmt: skip
        _claim(out, made_from)
        work = _Work(out / "parts", SuperpatchReader(store), labels, cohort, encoders, budget, seed, on)
        rows = Rows([*work.frozen(), *work.segmented(run)])
    notes = (*cohort.notes, *labels.notes[1:], *notes_on_spacing(run_dir, store))
    notes += (_UNKNOWN,) * bool(adapters) + (_NO_SURFACE,) * (bool(budget.patients) and not has_surface_dice())
    first = next(iter(encoders))
    found = findings(rows, first)
    proof = Proof(first, rows, found, tuple(chance(rows)), tuple(limits(found, chosen)), notes, as_json(made_from))
    write_json(out / "prove.json", proof.document())
    write_page(proof, out)
    return proof


_UNKNOWN = "what an adapter's encoder was trained on cannot be checked: it may have seen the scored scans"
_NO_SURFACE = "no surface Dice without MONAI: pip install maesil[prove]"


def _encoders(
    paths: Sequence[Path], adapters: Sequence[str], run: Run, seed: int, device: torch.device
) -> dict[str, Backbone]:
    """Return the encoders by name: the run's, its untrained twin, those of other runs, the adapters'."""
    encoders, _ = encoders_of(paths, seed, device)
    for name in adapters:
        if name in encoders:
            raise UsageError(f"--adapter {name}: given twice; name it once")
        encoders[name] = load_adapter(name, run.config.model, run.intensity)
    return encoders


def _hash_of(labels: Labels) -> str:
    digest = hashlib.sha256()
    for volume in labels.volumes:
        digest.update(np.ascontiguousarray(labels.of(volume)).data)
    return digest.hexdigest()


def _claim(out: Path, made_from: Mapping[str, Any]) -> None:
    """Make ``out`` the folder of this proof, or find that it is already."""
    marker, document = out / "made_from.json", as_json(dict(made_from))
    if marker.exists():
        before, now = _settings_of_parts(read_json(marker)), _settings_of_parts(document)
        if changed := [name for name in now if before.get(name) != now[name]]:
            raise UsageError(f"{out}: holds a proof with another {', '.join(changed)}; name another --out")
    write_json(marker, document)


def _settings_of_parts(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the parts of a proof depend on: a segmentation of four patients says nothing of one of eight."""
    budget = {name: value for name, value in made_from.get("budget", {}).items() if name != "patients"}
    return {**made_from, "budget": budget}


@dataclass(frozen=True)
class _Work:
    """The parts of a proof, each found or made."""

    folder: Path
    reader: SuperpatchReader
    labels: Labels
    cohort: Cohort
    encoders: dict[str, Backbone]
    budget: ProofBudget
    seed: int
    device: torch.device

    @property
    def first(self) -> str:
        return next(iter(self.encoders))

    def frozen(self) -> Iterator[Row]:
        """Yield what frozen encoders score."""
        yield from self._found_or("shares", self._shares)
        yield from self._found_or("crops", self._crops)

    def segmented(self, run: Run) -> Iterator[Row]:
        """Yield what segmentations score that begin from them."""
        others = {name: one for name, one in self.encoders.items() if name not in (self.first, "untrained")}
        course = Course(
            self.reader, self.labels, self.cohort.learnt, self.cohort.scored, self.budget.learning,
            self.budget.points, self.budget.tolerance_mm, self.device,
        )  # fmt: skip
        starts = list(enumerate(starts_of(run, self.first, others)))
        lessons = [
            (f"learnt_{shots}_{seed}_{number}", Lesson(shots, self.seed + seed, start))
            for shots in numbers_of_patients(self.budget.patients, len(self.cohort.learnt))
            for seed in range(self.budget.seeds)
            for number, start in starts
        ]
        total = len(lessons) * self.budget.steps
        with progress({"segmentation": "step"}) as report:
            for turn, (name, lesson) in enumerate(lessons):

                def rows(turn: int = turn, lesson: Lesson = lesson) -> Iterator[Row]:
                    for step, found in learn(lesson, course):
                        report("segmentation", turn * self.budget.steps + step, total)
                        yield from found

                yield from self._found_or(name, rows)

    def _found_or(self, name: str, make: Callable[[], Iterable[Row]]) -> list[Row]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, {"rows": [vars(row) for row in make()]})
        document = read_json(path)
        with fields_of(path):
            return [Row(**row) for row in document["rows"]]

    def _shares(self) -> Iterator[Row]:
        per_volume = max(1, self.budget.patches // len(self.labels.volumes))
        looked_at = look_at(self.reader, self.labels, self.encoders, per_volume, self.seed)
        return score_shares(looked_at, self.cohort, [*self.encoders, "voxels"], self.labels.classes, self.seed)

    def _crops(self) -> Iterator[Row]:
        crops = look_at_crops(self.reader, self.labels, self.encoders, self.cohort.patient_of())
        learnt, scored = list(self.cohort.learnt), list(self.cohort.scored)
        yield from score_presence(crops, self.labels.classes, learnt, scored, self.first, self.seed)
        yield from score_retrieval(crops, learnt, scored, self.first, self.seed)
        yield from score_other_scan(crops, scored)
