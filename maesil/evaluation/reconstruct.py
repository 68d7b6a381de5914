"""A whole volume reconstructed: every voxel predicted while it was hidden, crops blended so that no seam shows.

Crops overlap by half. Each is predicted under complementary masks (`maesil.models.masking.complementary_masks`) until
each of its tokens was hidden at least once; a voxel's value is the mean over the masks that hid it. Crops are then
averaged with a weight that falls smoothly to nothing at their faces. No prediction of a voxel ever saw that voxel.

Shapes: B crops, Z Y X voxels of a crop or of the volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maesil.cache.provenance import notes_on_spacing
from maesil.config.schema import RunConfig
from maesil.data.crops import read_crop
from maesil.data.known_scans import EARLIER, known_scans, same_patients
from maesil.devices import pick_device
from maesil.evaluation.metrics import ErrorSums, region_voxels
from maesil.evaluation.predict import ModelPredictor, Predictor, crops_at_once, mask_seed
from maesil.files import results_at_once
from maesil.models.masking import complementary_masks
from maesil.models.patches import expand_cells
from maesil.progress import Report, progress
from maesil.store.grid import box_at
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.store.urls import StorePlace
from maesil.text import counted
from maesil.training.checkpoint import Run, load_run
from maesil.types import AIR_HU, MAP_CELL, Edges, Window, Zyx, zyx


@dataclass(frozen=True)
class Reconstructed:
    """What `reconstruct_volume` wrote and found."""

    original: Path
    reconstruction: Path
    picture: Path
    psnr: float
    """dB over the valid voxels of the body, in the run's window; NaN where there is no body."""
    window: Window
    notes: tuple[str, ...]
    """How it was predicted, and what to keep in mind."""


@dataclass(frozen=True)
class HiddenPrediction:
    """A volume predicted from itself."""

    hu_ZYX: Tensor
    """Float32 HU, inside the run's window; -1024 in cells without any valid voxel."""
    crops: int
    passes: int
    """Most masks that one crop was predicted under."""


def reconstruct_volume(
    run_dir: Path,
    store_path: StorePlace,
    volume_id: str,
    *,
    out: Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Reconstructed:
    """Predict a volume of a store by a run; write both as NIfTI, and a picture, to ``out`` (RUN/reconstruction).

    ``volume_id`` may be any unique beginning of an id. Equal run, store and ``seed`` give equal files. Raises
    CheckpointError, StoreError, and UsageError for a volume that is not there.
    """
    run = load_run(run_dir, pick_device(device))
    store = Store.open(store_path)
    volume = store.volume(volume_id)
    out = out or run_dir / "reconstruction"

    reader, predictor = SuperpatchReader(store), ModelPredictor(run.model, run.intensity)
    with progress({"reconstruct": "crop"}) as report:
        on = next(run.model.parameters()).device
        predicted = predict_while_hidden(reader, volume, predictor, run.config, seed, on, report)

    original, hu = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape), predicted.hu_ZYX.cpu()
    body, sums = _body(reader, volume), ErrorSums(run.intensity.window)
    sums.add(torch.from_numpy(original), hu, body, body)
    made = Reconstructed(
        original=out / f"{volume.volume_id}_original.nii.gz",
        reconstruction=out / f"{volume.volume_id}_reconstruction.nii.gz",
        picture=out / f"{volume.volume_id}_planes.png",
        psnr=sums.psnr_hidden,
        window=run.intensity.window,
        notes=(
            _how(run, predicted),
            *_on_the_patient(run_dir, run, store, volume),
            *notes_on_spacing(run_dir, store),
        ),
    )
    shown = np.where(_inside(reader, volume), original, np.int16(AIR_HU))
    title, detail = _headline(run, volume, made.psnr)
    # matplotlib and nibabel, which not all that imports this module needs
    from maesil.pictures import save_volume
    from maesil.store.nifti import write_nifti

    with results_at_once(out) as place:
        write_nifti(place / made.original.name, original, volume.affine)
        write_nifti(place / made.reconstruction.name, hu.round().to(torch.int16).numpy(), volume.affine)
        picture = place / made.picture.name
        save_volume(picture, shown, hu.numpy(), body.numpy(), made.window, title, detail, volume.spacing)
    return made


def predict_while_hidden(
    reader: SuperpatchReader,
    volume: Volume,
    predictor: Predictor,
    config: RunConfig,
    seed: int,
    device: torch.device,
    report: Report | None = None,
) -> HiddenPrediction:
    """Predict every voxel of a volume from crops in which it was hidden; crops without any valid voxel are left out.

    The masks of a crop follow from (seed, volume, first voxel of the crop), as in an evaluation.
    """
    crop = config.model.crop_zyx
    origins = [one for one in overlapping_origins(volume.shape, crop) if _any_valid(reader, volume, one, crop)]
    padded = [max(edge, _whole_cells(n)) for n, edge in zip(volume.shape, crop, strict=True)]
    total, weight = torch.zeros(padded, device=device), torch.zeros(padded, device=device)
    window_ZYX, passes, at_once = blending_weights(crop).to(device), 0, crops_at_once(crop, device)
    for start in range(0, len(origins), at_once):
        batch = origins[start : start + at_once]
        values_BZYX, drawn = _predict_crops(reader, volume, batch, predictor, config, seed, device)
        passes = max(passes, drawn)
        for origin, values in zip(batch, values_BZYX, strict=True):
            box = box_at(origin, crop)
            total[box] += window_ZYX * values
            weight[box] += window_ZYX
        if report:
            report("reconstruct", start + len(batch), len(origins))
    inside = torch.from_numpy(_inside(reader, volume)).to(device)
    z, y, x = volume.shape
    blended = (total / weight.clamp_min(torch.finfo(weight.dtype).tiny))[:z, :y, :x]
    return HiddenPrediction(torch.where(inside, blended, float(AIR_HU)), len(origins), passes)


def overlapping_origins(shape: Zyx, crop: Edges) -> list[Zyx]:
    """List the first voxels of crops that overlap by half (or the next multiple of 8 above it), z y x.

    The last one along an axis is moved back to where the volume ends, so that none looks further beyond it than the
    last cell of 8 voxels reaches.
    """
    axes = []
    for size, edge in zip(shape, zyx(crop), strict=True):
        step = max(MAP_CELL, edge // 2 // MAP_CELL * MAP_CELL)
        last = max(0, _whole_cells(size) - edge)
        axes.append([*range(0, last, step), last])
    return [(z, y, x) for z, y, x in product(*axes)]


def blending_weights(crop: Edges) -> Tensor:
    """Return how much each voxel of a crop counts, float32 ``[Z, Y, X]``: sine squared along each axis.

    Of crops that overlap by half the weights add up to 1, and at its faces a crop counts next to nothing.
    """
    z, y, x = (
        torch.sin(torch.pi * (torch.arange(edge, dtype=torch.float64) + 0.5) / edge).square() for edge in zyx(crop)
    )
    return (z[:, None, None] * y[:, None] * x).float()


def _predict_crops(
    reader: SuperpatchReader,
    volume: Volume,
    origins: Sequence[Zyx],
    predictor: Predictor,
    config: RunConfig,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Return each crop's mean over the masks that hid a voxel, float32 HU ``[B, Z, Y, X]``, and how many masks."""
    model = config.model
    crops = [read_crop(reader, volume.volume_id, origin, model.crop) for origin in origins]
    hu_BZYX = torch.from_numpy(np.stack([one.hu for one in crops])).to(device)
    valid_BZYX = expand_cells(torch.from_numpy(np.stack([one.valid for one in crops])).to(device) == 255, MAP_CELL)
    seeds = [mask_seed(seed, volume.volume_id, origin) for origin in origins]
    total, count = torch.zeros(hu_BZYX.shape, device=device), torch.zeros(hu_BZYX.shape, device=device)
    passes = complementary_masks(config.mask, model.grid, seeds, device)
    for masks in passes:
        hidden = expand_cells(masks.mask.view(-1, *model.grid), model.patch)
        total += hidden * predictor.predict_hu(hu_BZYX, masks, valid_BZYX)
        count += hidden
    return total / count, len(passes)


def _any_valid(reader: SuperpatchReader, volume: Volume, origin: Zyx, crop: Zyx) -> bool:
    return bool(reader.read_map_region(volume.volume_id, "valid", origin, crop).any())


def _inside(reader: SuperpatchReader, volume: Volume) -> np.ndarray:
    """Return the voxels of cells that hold any valid voxel, bool ``[Z, Y, X]``."""
    z, y, x = volume.shape
    cells = torch.from_numpy(reader.read_map(volume.volume_id, "valid") > 0)
    return expand_cells(cells, MAP_CELL)[:z, :y, :x].numpy()


def _body(reader: SuperpatchReader, volume: Volume) -> Tensor:
    """Return the valid voxels of the body as evaluations score them, bool ``[Z, Y, X]``."""
    valid, body = (torch.from_numpy(reader.read_map(volume.volume_id, name)) for name in ("valid", "body"))
    return region_voxels(valid, body, volume.shape)["body"]


def _headline(run: Run, volume: Volume, psnr: float) -> tuple[str, str]:
    """Return the title of the picture, and what stands beside it."""
    (lo, hi), kind = run.intensity.window, run.config.mask.kind
    seen = "nothing was hidden" if kind == "none" else "each voxel predicted while hidden"
    title = f"volume {volume.volume_id[:8]}, step {run.step}"
    return title, f"window {lo:g} to {hi:g} HU; {seen}; {psnr:.2f} dB in the body"


def _on_the_patient(run_dir: Path, run: Run, store: Store, volume: Volume) -> tuple[str, ...]:
    """Note whether the run was trained on this patient, and what could not be checked of that."""
    known = known_scans([run_dir])
    leaders, unchecked = known.patients(store)
    seen = same_patients(leaders, {*run.split.train, *known.groups("train", EARLIER)})
    trained = ("the run was trained on this patient: no measure of new patients",)
    return trained if volume.group in seen else unchecked


def _how(run: Run, predicted: HiddenPrediction) -> str:
    kind, crops = run.config.mask.kind, predicted.crops
    if kind == "none":
        trained = "the run was trained without a mask: the model saw every voxel that it reconstructs"
        return f"{counted(crops, 'crop')}; {trained}"
    masks = counted(predicted.passes, f"complementary {kind} mask")
    return f"{counted(crops, 'crop')} under {masks} each: every voxel was hidden from it"


def _whole_cells(size: int) -> int:
    """Round a length up to whole cells of the maps (voxels)."""
    return -(-size // MAP_CELL) * MAP_CELL
