"""Does pre-training help? A frozen linear probe: from single tokens to the share of each class in their patch.

The encoder stays as it is; ridge regression alone is learnt (`maesil.downstream.ridge`). Scored are patients that
neither the probe nor any compared encoder was trained on; with one labelled patient, blocks of it, a patch of distance
between what is learnt from and what is scored. Beside it stand the same encoder untrained, another run's (an AE, say),
and the patch's own voxels. Shapes: N patches, D features, K classes, L tokens, g patches along an axis.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from maesil.cache.provenance import notes_on_spacing
from maesil.config.schema import ModelConfig, require_tile
from maesil.data.crops import read_crop
from maesil.data.known_scans import EARLIER, known_scans
from maesil.devices import pick_device
from maesil.documents import write_json
from maesil.downstream.folds import Patients, longest_axis, patients_of
from maesil.downstream.labels import UNLABELLED, LabelArray, Labels, load_labels
from maesil.downstream.ridge import Array, Moments, auroc, fit, r_squared
from maesil.errors import UsageError
from maesil.files import make_folder
from maesil.models.encoders import Backbone, encoder_of, untrained_encoder
from maesil.progress import progress
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.text import counted
from maesil.training.checkpoint import load_run
from maesil.types import MAP_CELL, Edges, Zyx, edges_told, zyx

_PRESENT_FROM = 0.5
"""Share of a patch from which on a class counts as present, for the AUROC."""

ProbeRow = TypedDict(
    "ProbeRow",
    {
        "encoder": str,
        "class": str,
        "r2": float | None,
        "auroc": float | None,
        "r2_by_fold": NotRequired[list[float | None]],
    },
)
"""How well an encoder's vectors tell a class; ``class`` is ``mean`` for the mean over classes, which has no folds."""


class ProbeFacts(TypedDict):
    """What a probe was made of."""

    store_fingerprint: str
    seed: int
    folds: int
    patients_scored: int
    patients_learnt_from_only: int
    patches: int
    classes: dict[str, float]
    """The mean share of each class in the patches looked at."""


@dataclass(frozen=True)
class Patches:
    """Patches of one volume: where they are, what they hold, and what each encoder makes of them."""

    place_N3: NDArray[np.int64]
    """On the volume's grid of patches."""
    shares_NK: NDArray[np.float32]
    features: dict[str, NDArray[np.float32]]
    """By encoder, ``[N, D]``."""

    def where(self, chosen_N: NDArray[np.bool_]) -> Patches:
        """Return some of them."""
        some = {name: values[chosen_N] for name, values in self.features.items()}
        return Patches(self.place_N3[chosen_N], self.shares_NK[chosen_N], some)


@dataclass(frozen=True)
class Fold:
    """What is learnt from, in sets that a penalty can be chosen by leaving out, and what is scored."""

    train: tuple[Patches, ...]
    test: Patches


@dataclass(frozen=True)
class ProbeReport:
    """What a probe came to."""

    rows: list[ProbeRow]
    facts: ProbeFacts
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {**self.facts, "notes": list(self.notes), "rows": self.rows}

    def table(self) -> list[Any]:
        """Return the table and the notes for people."""
        table = Table(title="Linear probe of patches held out: R2 (AUROC)", title_justify="left")
        encoders = list(dict.fromkeys(row["encoder"] for row in self.rows))
        for name in ("class", *encoders):
            table.add_column(name, justify="left" if name == "class" else "right")
        for name in dict.fromkeys(row["class"] for row in self.rows):
            cells = {
                row["encoder"]: f"{_text(row['r2'])} ({_text(row['auroc'])})"
                for row in self.rows
                if row["class"] == name
            }
            table.add_row(name, *(cells[encoder] for encoder in encoders))
        return [table, *self.notes]


def probe(
    run_dir: Path,
    store_path: StorePlace,
    labels_dir: Path,
    *,
    out: Path | None = None,
    against: Sequence[Path] = (),
    classes: Sequence[str] = (),
    folds: int = 5,
    patches: int = 100_000,
    seed: int = 0,
    device: str = "auto",
    include_trained: bool = False,
) -> ProbeReport:
    """Probe a run's encoder and those it is compared with; write ``probe.json`` to ``out`` (default RUN/probe).

    At most ``patches`` are looked at, equally many a volume, drawn at random among those of the body whose voxels are
    all valid and labelled. Equal arguments give equal scores on one machine. Raises CheckpointError, StoreError,
    NoInputError (no labels), UsageError (labels that do not fit, encoders of other crops or patches, nobody to score).
    """
    on, store = pick_device(device), Store.open(store_path)
    encoders, trained_on = encoders_of([run_dir, *against], seed, on)
    known, model = known_scans([run_dir, *against]), next(iter(encoders.values())).config
    require_tile(model, store.superpatch, store.path)
    reader, out = SuperpatchReader(store), out or run_dir / "probe"
    make_folder(out)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        labels = load_labels(labels_dir, store.volumes(), Path(scratch), classes)
        leaders, unchecked = known.patients(store)
        trained_on |= known.groups("train", EARLIER)
        patients = patients_of(leaders, labels.volumes, trained_on, seed, include_trained=include_trained)
        looked_at = look_at(reader, labels, encoders, max(1, patches // len(labels.volumes)), seed)
    cut, told, used = _fold(looked_at, patients, labels.volumes, model, folds)
    shares_NK = np.concatenate([one.shares_NK for one in used])
    facts: ProbeFacts = {
        "store_fingerprint": store.fingerprint,
        "seed": seed,
        "folds": len(cut),
        "patients_scored": len(patients.unseen),
        "patients_learnt_from_only": len(patients.seen),
        "patches": len(shares_NK),
        "classes": dict(zip(labels.classes, shares_NK.mean(axis=0, dtype=np.float64).tolist(), strict=True)),
    }
    notes = (told, *labels.notes, *unchecked, *notes_on_spacing(run_dir, store), *(_OPTIMISTIC,) * include_trained)
    notes += tuple(_rare(looked_at, patients, labels.classes))
    report = ProbeReport(_score(cut, [*encoders, "voxels"], labels.classes), facts, notes)
    write_json(out / "probe.json", report.document())
    return report


_OPTIMISTIC = "patients that an encoder was trained on were scored too (--include-trained): optimistic"


def _rare(looked_at: dict[str, Patches], patients: Patients, classes: Sequence[str]) -> Iterator[str]:
    """Note the classes that a single patient has, where others are looked at too."""
    everyone = [*patients.unseen, *patients.seen]
    if len(everyone) < 2:
        return
    for k, name in enumerate(classes):
        having = sum(any((looked_at[v].shares_NK[:, k] > 0).any() for v in patient) for patient in everyone)
        if having == 1:
            yield f"{name} is in one of the {len(everyone)} patients alone: whoever is scored on it, nobody taught it"


def encoders_of(runs: Sequence[Path], seed: int, device: torch.device) -> tuple[dict[str, Backbone], set[str]]:
    """Return the encoders by name, the first run's untrained twin too, and the patient groups they were trained on."""
    encoders: dict[str, Backbone] = {}
    trained_on: set[str] = set()
    for path in runs:
        run = load_run(path, device)
        name: str = run.config.model.kind
        name = name if name not in encoders else f"{name} ({path.name})"
        if name in encoders:
            raise UsageError(f"{path}: compared with itself; name another run with --against")
        encoders[name] = encoder_of(run.model, run.intensity).to(device)
        trained_on |= set(run.split.train)
        if len(encoders) == 1:
            encoders["untrained"] = untrained_encoder(run.config.model, run.intensity, seed).to(device)
    first, *others = encoders.values()
    for other in others:
        if (other.config.crop, other.config.patch) != (first.config.crop, first.config.patch):
            found = ", then ".join(
                f"{edges_told(one.config.crop)} and {edges_told(one.config.patch)}" for one in (first, other)
            )
            raise UsageError(f"expected runs of equal model.crop and model.patch, found {found}")
    return encoders, trained_on


def look_at(
    reader: SuperpatchReader, labels: Labels, encoders: dict[str, Backbone], most: int, seed: int
) -> dict[str, Patches]:
    """Return the patches of each labelled volume, by id."""
    model, found = next(iter(encoders.values())).config, {}
    with progress({"probe": "volume"}) as report:
        for number, volume in enumerate(labels.volumes):
            shares, usable = patch_classes(reader, volume, labels.of(volume), len(labels.classes), model)
            places = np.argwhere(usable)
            digest = hashlib.sha256(f"{seed}:{volume.volume_id}".encode()).digest()
            rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            places = places[np.sort(rng.permutation(len(places))[:most])]
            found[volume.volume_id] = Patches(
                places, shares[tuple(places.T)], _features(reader, volume, places, encoders)
            )
            report("probe", number + 1, len(labels.volumes))
    return found


def patch_classes(
    reader: SuperpatchReader, volume: Volume, labels: LabelArray, classes: int, model: ModelConfig
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the share of each class in each patch of a volume, ``[gz, gy, gx, K]``, and which patches are usable.

    Usable: some body, every voxel valid and labelled. The grid covers whole crops.
    """
    (PZ, PY, PX), pairs = model.patch_zyx, zip(volume.shape, model.crop_zyx, strict=True)
    padded_z, padded_y, padded_x = padded = tuple(-(-n // edge) * edge for n, edge in pairs)
    whole = np.full(padded, UNLABELLED, np.uint8)
    whole[tuple(slice(0, n) for n in volume.shape)] = labels
    cells = whole.reshape(padded_z // PZ, PZ, padded_y // PY, PY, padded_x // PX, PX)
    shares = np.stack([(cells == k).mean(axis=(1, 3, 5), dtype=np.float32) for k in range(1, classes + 1)], axis=-1)
    usable = ~(cells == UNLABELLED).any(axis=(1, 3, 5))
    size: Zyx = (padded_z, padded_y, padded_x)
    valid, body = (reader.read_map_region(volume.volume_id, name, (0, 0, 0), size) for name in ("valid", "body"))
    usable &= _on_patches(valid == 255, model.patch, all_of_it=True)
    usable &= _on_patches(body > 0, model.patch, all_of_it=False)
    return shares, usable


def _on_patches(cells: NDArray[np.bool_], patch: Edges, *, all_of_it: bool) -> NDArray[np.bool_]:
    """Turn map cells into patches: all of its cells, or any."""
    for axis, edge in enumerate(zyx(patch)):
        if edge < MAP_CELL:
            cells = cells.repeat(MAP_CELL // edge, axis=axis)
            continue
        k = edge // MAP_CELL
        grouped = cells.reshape(*cells.shape[:axis], cells.shape[axis] // k, k, *cells.shape[axis + 1 :])
        cells = np.asarray(grouped.all(axis=axis + 1) if all_of_it else grouped.any(axis=axis + 1))
    return cells


@torch.no_grad()
def _features(
    reader: SuperpatchReader, volume: Volume, places_N3: NDArray[np.int64], encoders: dict[str, Backbone]
) -> dict[str, NDArray[np.float32]]:
    """Encode the crops that hold the places; return each place's token by every encoder, and its voxels."""
    first = next(iter(encoders.values()))
    device, crop, grid = next(first.parameters()).device, np.array(first.config.crop_zyx), first.config.grid
    widths = {name: encoder.width for name, encoder in encoders.items()} | {"voxels": first.config.patch_voxels}
    found = {name: np.empty((len(places_N3), width), np.float32) for name, width in widths.items()}
    crop_of_N3 = places_N3 // np.array(grid)
    for of_crop in np.unique(crop_of_N3, axis=0):
        here = np.flatnonzero((crop_of_N3 == of_crop).all(axis=1))
        z, y, x = (of_crop * crop).tolist()
        hu = torch.from_numpy(read_crop(reader, volume.volume_id, (z, y, x), first.config.crop).hu)[None].to(device)
        inner = places_N3[here] - of_crop * np.array(grid)
        tokens = torch.from_numpy(np.ravel_multi_index(tuple(inner.T), grid)).to(device)
        for name, encoder in encoders.items():
            found[name][here] = encoder.forward_features(hu)[0, tokens].float().cpu().numpy()
        found["voxels"][here] = first.patches(hu)[0, tokens].float().cpu().numpy()
    return found


def _fold(
    looked_at: dict[str, Patches], patients: Patients, volumes: Sequence[Volume], model: ModelConfig, folds: int
) -> tuple[list[Fold], str, list[Patches]]:
    """Cut the patches into folds, say how, and return those that are in any; UsageError where there are not enough."""
    merged = {patient: join([looked_at[v] for v in patient]) for patient in (*patients.unseen, *patients.seen)}
    merged = {patient: patches for patient, patches in merged.items() if len(patches.shares_NK)}
    unseen = [patient for patient in patients.unseen if patient in merged]
    if not unseen:
        raise UsageError("expected patches of the body that are valid and labelled as a whole, found none to score")
    if len(merged) == 1:
        of_patient = (volume for volume in volumes if volume.volume_id in unseen[0])
        volume = max(of_patient, key=lambda one: len(looked_at[one.volume_id].shares_NK))
        cut = list(spatial_folds(looked_at[volume.volume_id], volume.shape, model))
        if not cut:
            raise UsageError("expected labels in two layers of crops of the one labelled patient, found them in one")
        told = f"one labelled patient: {counted(len(cut), 'fold')} by blocks of its volume, one patch apart"
        return cut, told + _others_unused(len(unseen[0])), [looked_at[volume.volume_id]]
    count = min(max(folds, 2), len(unseen))
    cut = []
    for number in range(count):
        left_out = unseen[number::count]
        train = tuple(one for patient, one in merged.items() if patient not in left_out)
        cut.append(Fold(train, join([merged[patient] for patient in left_out])))
    told = f"{counted(count, 'fold')} by patient: nobody is in both parts of a fold"
    if only_learnt_from := len(merged) - len(unseen):
        told += f"; {counted(only_learnt_from, 'patient')} that an encoder was trained on, learnt from and not scored"
    return cut, told, list(merged.values())


def _others_unused(volumes: int) -> str:
    return f"; the other {counted(volumes - 1, 'volume')} of the patient not used" if volumes > 1 else ""


def spatial_folds(patches: Patches, shape: Zyx, model: ModelConfig) -> Iterator[Fold]:
    """Yield one fold a layer of crops along the longest axis: scored is the layer, learnt from what is further away.

    A patch that touches the scored layer is in neither. Blocks without any patch are left out.
    """
    axis = longest_axis(shape, model.crop)
    g = model.grid[axis]
    along_N = patches.place_N3[:, axis]
    blocks = np.unique(along_N // g)
    for block in blocks:
        near = (along_N >= block * g - 1) & (along_N <= (block + 1) * g)
        train = [patches.where(~near & (along_N // g == other)) for other in blocks if other != block]
        train = [one for one in train if len(one.shares_NK)]
        if train:
            yield Fold(tuple(train), patches.where(along_N // g == block))


def join(parts: Sequence[Patches]) -> Patches:
    """Return the patches of several volumes as one set."""
    return Patches(
        np.concatenate([one.place_N3 for one in parts]),
        np.concatenate([one.shares_NK for one in parts]),
        {name: np.concatenate([one.features[name] for one in parts]) for name in parts[0].features},
    )


def _score(folds: Sequence[Fold], encoders: Sequence[str], classes: Sequence[str]) -> list[ProbeRow]:
    """Fit and score every encoder on every fold: a row an encoder and class, and the mean over classes.

    Patches of all folds are scored together: in a patient with hardly any of a class R2 alone means little.
    """
    truths = [fold.test.shares_NK.astype(np.float64) for fold in folds]
    rows: list[ProbeRow] = []
    for encoder in encoders:
        predictions = []
        for fold in folds:
            model = fit([Moments.of(part.features[encoder], part.shares_NK) for part in fold.train])
            predictions.append(model(fold.test.features[encoder]))
        of_classes = [
            _of_class(encoder, name, [t[:, k] for t in truths], [p[:, k] for p in predictions])
            for k, name in enumerate(classes)
        ]
        rows += [*of_classes, _mean(encoder, of_classes)]
    return rows


def _of_class(encoder: str, name: str, truths: Sequence[Array], predictions: Sequence[Array]) -> ProbeRow:
    truth, predicted = np.concatenate(truths), np.concatenate(predictions)
    return {
        "encoder": encoder,
        "class": name,
        "r2": r_squared(truth, predicted),
        "auroc": auroc(truth >= _PRESENT_FROM, predicted),
        "r2_by_fold": [r_squared(one, other) for one, other in zip(truths, predictions, strict=True)],
    }


def _mean(encoder: str, rows: Sequence[ProbeRow]) -> ProbeRow:
    """Average what could be scored."""

    def mean_of(score: Literal["r2", "auroc"]) -> float | None:
        known = [value for row in rows if (value := row[score]) is not None]
        return float(np.mean(known)) if known else None

    return {"encoder": encoder, "class": "mean", "r2": mean_of("r2"), "auroc": mean_of("auroc")}


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
