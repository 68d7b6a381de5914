"""Draw ``reconstruction.png`` for the README: a scan of the demo, what the model is given, and what it makes of it.

Run from the root of the repository, after `make demo`: ``python docs/draw_reconstruction.py demo``. The scan is that of
the patient whom the demo did not train on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from maesil.data.split import Split
from maesil.evaluation.predict import ModelPredictor, reconstruct
from maesil.pictures import MASK_COLOUR
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.store.store import Store
from maesil.training.checkpoint import load_run

PICTURE = Path(__file__).with_name("reconstruction.png")
COLUMNS = ("input", "what the model is given", "what it makes of it")
SEED = 0


def panels(demo: Path) -> list[NDArray[np.float32]]:
    """Return the three volumes of COLUMNS as colours 0..1, ``[Z, Y, X, 3]``; visible voxels are pasted in."""
    run, store = load_run(demo / "run"), Store.open(demo / "store.zarr")
    reader, volume = SuperpatchReader(store), held_out(store, run.split)
    predictor = ModelPredictor(run.model, run.intensity)
    made = reconstruct(reader, volume, predictor, run.config, SEED, torch.device("cpu"))
    hidden, (lo, hi) = made.hidden.numpy()[..., None], run.intensity.window
    scan = reader.read_region(volume.volume_id, (0, 0, 0), volume.shape)
    grey, predicted = (
        np.repeat(np.clip((hu.astype(np.float32) - lo) / (hi - lo), 0, 1)[..., None], 3, axis=-1)
        for hu in (scan, made.predicted.numpy())
    )
    colour = np.asarray(MASK_COLOUR, dtype=np.float32)
    return [grey, np.where(hidden, colour, grey), np.where(hidden, predicted, grey)]


def held_out(store: Store, split: Split) -> Volume:
    """Return the first volume of a patient whom the run was validated on."""
    return next(volume for volume in store.volumes() if volume.group in split.validation)


def draw(volumes: list[NDArray[np.float32]]) -> Figure:
    """Draw the middle axial slice above the middle coronal one; anterior and superior up."""
    z, y, x = volumes[0].shape[:3]
    heights = [y, z]
    figure = Figure(figsize=(9, 9 * (sum(heights) / 3 / x) * 1.08), dpi=80, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, height_ratios=heights, gridspec_kw={
        "left": 0.005, "right": 0.995, "bottom": 0.005, "top": 0.94, "wspace": 0.02, "hspace": 0.02,
    })  # fmt: skip
    for column, (name, colours) in enumerate(zip(COLUMNS, volumes, strict=True)):
        axes[0, column].imshow(colours[z // 2], origin="upper")
        axes[1, column].imshow(colours[:, y // 2], origin="lower")
        axes[0, column].set_title(name, fontsize=12)
    for one in axes.flat:
        one.set_axis_off()
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected the folder of a finished demo: python docs/draw_reconstruction.py demo")
    draw(panels(Path(sys.argv[1]))).savefig(PICTURE, metadata={"Software": None})
    print(PICTURE)
