"""Pictures of reconstructions, as a radiologist reads them: three planes, anterior and superior up, right on the left.

Shapes: Z Y X voxels; the axes z, y, x point to Superior, Posterior, Left. Nothing here touches matplotlib's global
state: figures are drawn on their own Agg canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from maesil.types import FloatArray, HuArray, Spacing, Window

Float32 = NDArray[np.float32]
_Number = TypeVar("_Number", bound="np.generic[Any]")

COLUMNS = ("input", "masked input", "reconstruction", "pasted", "error")

ERROR_COLOURS = LinearSegmentedColormap.from_list(
    "maesil_error", ["#9be7ff", "#2a8fe0", "#0b2a55", "#000000", "#5c2400", "#e2701d", "#ffd9a0"]
)
"""Blue: predicted too low; orange: too high; black: right. Told apart with any colour vision."""

MASK_COLOUR = (0.17, 0.21, 0.33)
"""What hides voxels: a blue that no grey value has."""

_NICE_LIMITS = (20, 50, 100, 150, 200, 300, 400, 500, 750, 1000, 1500, 2000)
_PANEL_INCHES = 2.4
_HEADER_INCHES = 0.72
_BAR_INCHES = 0.75
_MARGIN_INCHES = 0.1
_GAP_INCHES = 0.06


@dataclass(frozen=True)
class _Plane:
    """One of the three planes: its name, the axis it cuts, and the letters at its left, right, top and bottom."""

    name: str
    axis: int
    rows: int
    columns: int
    """Axes of the volume down and across the picture."""
    letters: tuple[str, str, str, str]
    upward: bool
    """Whether the row index grows upwards in the patient (z does, y does not)."""


_PLANES = (
    _Plane("axial", 0, 1, 2, ("R", "L", "A", "P"), upward=False),
    _Plane("coronal", 1, 0, 2, ("R", "L", "S", "I"), upward=True),
    _Plane("sagittal", 2, 0, 1, ("A", "P", "S", "I"), upward=True),
)


def save_reconstruction(
    path: Path,
    volume_ZYX: HuArray,
    mask_ZYX: NDArray[np.bool_],
    prediction_ZYX: FloatArray,
    window: Window,
    title: str = "",
    spacing: Spacing = (1.0, 1.0, 1.0),
) -> None:
    """Write one PNG: rows axial, coronal, sagittal; columns input, masked input, reconstruction, pasted, error.

    ``volume_ZYX`` and ``prediction_ZYX`` are HU, ``mask_ZYX`` is True where a voxel was hidden. *Reconstruction* shows
    the prediction where it counts, at hidden voxels; *pasted* fills in the visible ones; *error* is pasted minus input,
    signed, both clipped to the window. ``spacing`` (z, y, x) mm gives every plane its true proportions.
    """
    limit = _error_limit(volume_ZYX, prediction_ZYX, mask_ZYX, window)

    def columns(cut: _Cut) -> dict[str, Float32]:
        panels = _panels(cut(volume_ZYX), cut(mask_ZYX), cut(prediction_ZYX), window)
        return {**panels, "error": _error_rgb(panels["error"], limit)}

    figure = _draw_panels(columns, volume_ZYX, mask_ZYX, spacing, margin=_BAR_INCHES)
    _error_bar(figure, limit)
    hidden = f"window {window[0]:g} to {window[1]:g} HU, {mask_ZYX.mean():.0%} of the voxels hidden"
    _headline(figure, title, hidden)
    figure.savefig(path, format="png", metadata={"Software": None})


def save_comparison(
    path: Path,
    volume_ZYX: HuArray,
    mask_ZYX: NDArray[np.bool_],
    predictions: Mapping[str, FloatArray],
    window: Window,
    title: str = "",
    spacing: Spacing = (1.0, 1.0, 1.0),
) -> None:
    """Write one PNG: rows axial, coronal, sagittal; columns the input, the masked input, and each prediction pasted.

    Arrays as in `save_reconstruction`. Where everything is predicted (``mask_ZYX`` True everywhere) there is no masked
    input to show.
    """
    shown = ("input",) if mask_ZYX.all() else ("input", "masked input")

    def columns(cut: _Cut) -> dict[str, Float32]:
        of_each = {
            name: _panels(cut(volume_ZYX), cut(mask_ZYX), cut(prediction_ZYX), window)
            for name, prediction_ZYX in predictions.items()
        }
        first = next(iter(of_each.values()))
        return {name: first[name] for name in shown} | {name: panels["pasted"] for name, panels in of_each.items()}

    figure = _draw_panels(columns, volume_ZYX, mask_ZYX, spacing, margin=0.0)
    _headline(figure, title, f"window {window[0]:g} to {window[1]:g} HU")
    figure.savefig(path, format="png", metadata={"Software": None})


def save_volume(
    path: Path,
    volume_ZYX: HuArray,
    prediction_ZYX: FloatArray,
    scored_ZYX: NDArray[np.bool_],
    window: Window,
    title: str = "",
    detail: str = "",
    spacing: Spacing = (1.0, 1.0, 1.0),
) -> None:
    """Write one PNG of a volume that was predicted everywhere: columns input, reconstruction, error.

    Arrays as in `save_reconstruction`. The errors at ``scored_ZYX`` set the scale of the error's colours; ``detail``
    stands at the right of the title.
    """
    everywhere = np.ones(volume_ZYX.shape, dtype=np.bool_)
    limit = _error_limit(volume_ZYX, prediction_ZYX, scored_ZYX, window)

    def columns(cut: _Cut) -> dict[str, Float32]:
        panels = _panels(cut(volume_ZYX), cut(everywhere), cut(prediction_ZYX), window)
        shown = {name: panels[name] for name in ("input", "reconstruction")}
        return {**shown, "error": _error_rgb(panels["error"], limit)}

    figure = _draw_panels(columns, volume_ZYX, everywhere, spacing, margin=_BAR_INCHES)
    _error_bar(figure, limit)
    _headline(figure, title, detail)
    figure.savefig(path, format="png", metadata={"Software": None})


class _Cut(Protocol):
    """Takes the slice of a plane out of a volume, ``[Z, Y, X]`` to ``[rows, columns]``."""

    def __call__(self, volume: NDArray[_Number]) -> NDArray[_Number]: ...


def _draw_panels(
    columns: Callable[[_Cut], Mapping[str, Float32]],
    volume_ZYX: HuArray,
    mask_ZYX: NDArray[np.bool_],
    spacing: Spacing,
    margin: float,
) -> Figure:
    """Draw columns side by side in three planes; leave room at the right.

    ``columns`` makes the images ``[rows, columns, 3]`` of one plane: only what is shown is ever coloured.
    """
    extents = tuple(n * mm for n, mm in zip(volume_ZYX.shape, spacing, strict=True))
    indices = [_best_slice(volume_ZYX, mask_ZYX, plane.axis) for plane in _PLANES]
    rows = [columns(_cut_at(plane.axis, index)) for plane, index in zip(_PLANES, indices, strict=True)]
    layout = _Layout(extents, len(rows[0]), margin)
    figure, axes = layout.figure()
    for row, (plane, index, images) in enumerate(zip(_PLANES, indices, rows, strict=True)):
        for column, image in enumerate(images.values()):
            axes.imshow(image, origin="lower" if plane.upward else "upper", extent=layout.extent(row, column))
        _annotate(axes, layout.extent(row, 0), plane, f"{plane.name} {index + 1}/{volume_ZYX.shape[plane.axis]}")
    for column, name in enumerate(rows[0]):
        left, right = layout.column(column)
        axes.text((left + right) / 2, layout.height + 0.08, name, color="white", fontsize=11, ha="center", va="bottom")
    axes.set(xlim=(0, layout.width), ylim=(0, layout.height))
    return figure


def _cut_at(axis: int, index: int) -> _Cut:
    def cut(volume: NDArray[_Number]) -> NDArray[_Number]:
        image: NDArray[_Number] = np.moveaxis(volume, axis, 0)[index]
        return image

    return cut


@dataclass(frozen=True)
class _Layout:
    """Where panels lie, in inches from the lower left corner of the block of panels; one scale for all planes."""

    extents_mm: tuple[float, ...]
    """Of the volume along z, y, x."""
    columns: int
    margin: float
    """Room at the right (inches)."""

    @property
    def inches_per_mm(self) -> float:
        """The wider of the planes fills a column."""
        return _PANEL_INCHES / max(self.extents_mm[1:])

    @property
    def width(self) -> float:
        """Of all columns."""
        return self.column(self.columns - 1)[1]

    @property
    def height(self) -> float:
        """Of all rows."""
        return sum(self._row_height(plane) + _GAP_INCHES for plane in _PLANES) - _GAP_INCHES

    def column(self, column: int) -> tuple[float, float]:
        """Return the left and right end of a column."""
        left = column * (_PANEL_INCHES + _GAP_INCHES)
        return left, left + _PANEL_INCHES

    def extent(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Return the left, right, lower and upper end of a panel, centred in its column."""
        middle = sum(self.column(column)) / 2
        half = self.extents_mm[_PLANES[row].columns] * self.inches_per_mm / 2
        top = self.height - sum(self._row_height(plane) + _GAP_INCHES for plane in _PLANES[:row])
        return middle - half, middle + half, top - self._row_height(_PLANES[row]), top

    def figure(self) -> tuple[Figure, Axes]:
        """Make a black figure, and in it one axes, in inches, that all panels are drawn into."""
        width, height = (
            self.width + _MARGIN_INCHES + max(self.margin, _MARGIN_INCHES),
            self.height + _MARGIN_INCHES + _HEADER_INCHES,
        )
        figure = Figure(figsize=(width, height), dpi=130, facecolor="black")
        FigureCanvasAgg(figure)
        place = (_MARGIN_INCHES / width, _MARGIN_INCHES / height, self.width / width, self.height / height)
        axes = figure.add_axes(place)
        axes.set_axis_off()
        return figure, axes

    def _row_height(self, plane: _Plane) -> float:
        return self.extents_mm[plane.rows] * self.inches_per_mm


def _panels(volume: HuArray, mask: NDArray[np.bool_], prediction: FloatArray, window: Window) -> dict[str, Float32]:
    """Return each column's image of a slice: grey values 0..1 as RGB ``[rows, columns, 3]``, the error as HU."""
    lo, hi = window
    clipped: Float32 = np.clip(volume.astype(np.float32), lo, hi)
    pasted: Float32 = np.where(mask, np.clip(prediction.astype(np.float32), lo, hi), clipped)
    grey, pasted_grey = (np.asarray((hu - lo) / (hi - lo), dtype=np.float32) for hu in (clipped, pasted))
    colour = np.asarray(MASK_COLOUR, dtype=np.float32)
    hidden = mask[..., None]
    return {
        "input": _rgb(grey),
        "masked input": np.where(hidden, colour, _rgb(grey)),
        "reconstruction": np.where(hidden, _rgb(pasted_grey), colour),
        "pasted": _rgb(pasted_grey),
        "error": pasted - clipped,
    }


def _rgb(grey: Float32) -> Float32:
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))


def _error_rgb(error: Float32, limit: float) -> Float32:
    return np.asarray(ERROR_COLOURS(Normalize(-limit, limit)(error)), dtype=np.float32)


def _error_limit(volume: HuArray, prediction: FloatArray, scored: NDArray[np.bool_], window: Window) -> float:
    """Return the end of the colour bar (HU): a round number above 99 % of the errors of the voxels that count."""
    clipped, predicted = (np.clip(hu[scored].astype(np.float32), *window) for hu in (volume, prediction))
    errors = predicted - clipped
    reach = float(np.percentile(np.abs(errors), 99)) if errors.size else 0.0
    return float(next((limit for limit in _NICE_LIMITS if limit >= reach), _NICE_LIMITS[-1]))


def _best_slice(volume: HuArray, mask: NDArray[np.bool_], axis: int) -> int:
    """Return the slice to show: the middle one, unless others show much more tissue, both hidden and visible."""
    others = tuple(other for other in range(3) if other != axis)
    tissue = volume > -500
    content = ((tissue & mask).sum(axis=others) + 1.0) * ((tissue & ~mask).sum(axis=others) + 1.0)
    middle = volume.shape[axis] // 2
    return middle if content[middle] >= 0.5 * content.max() else int(content.argmax())


def _annotate(axes: Axes, extent: tuple[float, float, float, float], plane: _Plane, told: str) -> None:
    """Write the plane, its slice and the patient's directions into a panel."""
    x0, x1, y0, y1 = extent
    inset, x, y = 0.05, (x0 + x1) / 2, (y0 + y1) / 2
    outline = [withStroke(linewidth=2, foreground="black")]
    places = (
        (x0 + inset, y, "left", "center"),
        (x1 - inset, y, "right", "center"),
        (x, y1 - inset, "center", "top"),
        (x, y0 + inset, "center", "bottom"),
    )
    for letter, (at_x, at_y, ha, va) in zip(plane.letters, places, strict=True):
        axes.text(
            at_x, at_y, letter, ha=ha, va=va, color="#ffe08a", fontsize=9, fontweight="bold", path_effects=outline
        )
    axes.text(x0 + inset, y1 - inset, told, ha="left", va="top", color="white", fontsize=7.5, path_effects=outline)


def _error_bar(figure: Figure, limit: float) -> None:
    """Add the colour bar of the errors at the right edge."""
    width, height = figure.get_size_inches()
    length = height - _HEADER_INCHES - _MARGIN_INCHES
    place = ((width - _BAR_INCHES + 0.08) / width, _MARGIN_INCHES / height, 0.13 / width, length / height)
    bar = figure.colorbar(
        ScalarMappable(Normalize(-limit, limit), ERROR_COLOURS),
        cax=figure.add_axes(place),
        ticks=np.linspace(-limit, limit, 5),
        extend="both",
        extendfrac=0.02,
    )
    bar.set_ticklabels([f"{tick:+g}" if tick else "0" for tick in np.linspace(-limit, limit, 5)])
    bar.ax.tick_params(colors="white", labelsize=8, length=2)
    bar.ax.set_title("HU", color="white", fontsize=9, pad=8)
    bar.outline.set_edgecolor("#666666")


def _headline(figure: Figure, title: str, detail: str) -> None:
    width, height = figure.get_size_inches()
    x = 0.12 / width
    figure.text(x, 1 - 0.1 / height, title, color="white", fontsize=12, fontweight="bold", va="top")
    figure.text(1 - 0.1 / width, 1 - 0.12 / height, detail, color="#bbbbbb", fontsize=9, va="top", ha="right")
