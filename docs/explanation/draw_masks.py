"""Draw ``masks.png``: one mask of each kind over a small grid of tokens.

Run from the root of the repository: ``python docs/explanation/draw_masks.py``. The masks are those that training
draws (`maesil.models.masking.make_masks`); nothing here knows how they are made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LightSource
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from maesil.config.schema import MaskConfig
from maesil.models.masking import make_masks

GRID, SEED = (8, 8, 8), 0
"""The token grid of ``tiny``: 64 voxels in patches of 8."""
PICTURE = Path(__file__).with_name("masks.png")

VISIBLE, HIDDEN, HIDDEN_EVERYWHERE = "#e9e4d8", "#6d7a99", "#1f2a44"
EDGE = "#ffffff"
WHAT = {
    "dual": "plane 0.5, axis 0.5\n(the paper's idea,\nour ratios)",
    "random": "share 0.75\n(as in MAE)",
    "tube": "plane 0.5\n(dual without its\naxis mask)",
    "slab": "plane 0.5, axis 0.5\n(whole columns and\nwhole layers)",
}
LAYERS = (0, 3, 7)


def draw() -> Figure:
    """Draw a row a kind: the visible tokens in space, three of the axial layers, one coronal cut."""
    figure = Figure(figsize=(12.4, 11.5), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    for row, kind in enumerate(WHAT):
        hidden = make_masks(MaskConfig(kind=kind), GRID, [SEED]).mask[0].reshape(GRID).numpy() > 0
        column_hidden = np.broadcast_to(hidden.all(axis=0), GRID)
        colours = np.where(column_hidden, HIDDEN_EVERYWHERE, np.where(hidden, HIDDEN, VISIBLE))
        _name(figure, row, kind, hidden)
        _cube(figure, row, colours)
        for place, z in enumerate(LAYERS):
            axes = figure.add_axes((0.385 + 0.15 * place, _bottom(row) + 0.02, 0.135, 0.155))
            _squares(axes, colours[z], origin="upper")
            axes.set_title(f"axial layer z = {z}", fontsize=10)
            if not place:
                _label(axes, "x", "y")
        axes = figure.add_axes((0.385 + 0.15 * 3 + 0.015, _bottom(row) + 0.02, 0.135, 0.155))
        _squares(axes, colours[:, 4], origin="lower")
        axes.set_title("coronal cut, y = 4", fontsize=10)
        _label(axes, "x", "z")
    figure.text(0.25, 0.985, "what the encoder is given", fontsize=12, ha="center", va="top", style="italic")
    figure.text(0.69, 0.985, "the same mask, cut", fontsize=12, ha="center", va="top", style="italic")
    named = {"visible": VISIBLE, "hidden": HIDDEN, "hidden, with its whole z column": HIDDEN_EVERYWHERE}
    patches = [Patch(facecolor=colour, edgecolor="#999999", label=name) for name, colour in named.items()]
    figure.legend(handles=patches, loc="lower center", ncols=3, frameon=False, fontsize=12)
    return figure


def _bottom(row: int) -> float:
    return 0.765 - 0.235 * row


def _name(figure: Figure, row: int, kind: str, hidden: NDArray[np.bool_]) -> None:
    """Write the kind, its ratios, and how many tokens it hides."""
    top = _bottom(row) + 0.165
    figure.text(0.015, top, kind, fontsize=19, fontweight="bold", va="top")
    figure.text(0.015, top - 0.035, WHAT[kind], fontsize=11, va="top", color="#444444")
    counts = f"{hidden.sum()} of {hidden.size} hidden\n{(~hidden).sum()} visible"
    figure.text(0.015, top - 0.12, counts, fontsize=11, va="top")


def _cube(figure: Figure, row: int, colours: NDArray[np.str_]) -> None:
    """Draw the visible tokens as cubes; y points to the viewer, as it points down in an axial layer."""
    axes = figure.add_axes((0.135, _bottom(row) - 0.02, 0.23, 0.235), projection="3d")
    xyz = colours.transpose(2, 1, 0)
    axes.voxels(
        xyz == VISIBLE, facecolors=VISIBLE, edgecolor="#6f6a5c", linewidth=0.5, lightsource=LightSource(300, 55)
    )
    axes.set(xlim=(0, 8), ylim=(8, 0), zlim=(0, 8))
    axes.set_xlabel("x", labelpad=-14)
    axes.set_ylabel("y", labelpad=-14)
    axes.set_zlabel("z", labelpad=-14)
    axes.set(xticks=[], yticks=[], zticks=[])
    axes.set_box_aspect((1, 1, 1), zoom=1.1)
    axes.view_init(elev=24, azim=-58)


def _squares(axes: Axes, colours: NDArray[np.str_], origin: str) -> None:
    rgb = [[tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in line] for line in colours]
    axes.imshow(np.asarray(rgb, dtype=np.uint8), origin=origin)
    edges = np.arange(len(colours) + 1) - 0.5
    axes.set(xticks=edges, yticks=edges, xticklabels=[], yticklabels=[])
    axes.grid(color=EDGE, linewidth=1.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label(axes: Axes, across: str, down: str) -> None:
    axes.set_xlabel(across, fontsize=10, labelpad=1)
    axes.set_ylabel(down, fontsize=10, labelpad=1, rotation=0)


if __name__ == "__main__":
    draw().savefig(PICTURE, metadata={"Software": None})
