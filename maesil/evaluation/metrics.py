"""The scores: what each one is, in one place. ``docs/explanation/metrics.md`` tells the protocol.

Every score compares one predicted volume with its reference, both in HU and both clipped to the window, whose
width is the data range. Sums are kept in float64. Shapes: Z Y X voxels of one volume (``reference_ZYX`` and
``predicted_ZYX`` HU of any real dtype, the masks bool).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from maesil.models.patches import expand_cells
from maesil.types import MAP_CELL, Edges, Window, Zyx, zyx

BODY_SHARE = 128
"""A cell of the ``body`` map counts as body from this share on (of 255): half of it."""

_AT_ONCE = 2**18
"""How many voxels of slices are added up at once on a CPU: they stay in its cache."""


Name = TypeVar("Name", bound=Hashable)

Region = Literal["body", "whole"]
REGIONS: tuple[Region, ...] = get_args(Region)


def region_voxels(valid_cells: Tensor, body_cells: Tensor, shape: Zyx) -> dict[Region, Tensor]:
    """Return the scored regions of a volume as bool ``[Z, Y, X]``, from its uint8 maps of 8^3 cells.

    ``whole``: the voxels of cells that lie wholly inside the scan (share 255). ``body``: those of them whose
    cell is at least half body (share >= 128).
    """
    valid = valid_cells == 255
    body = valid & (body_cells >= BODY_SHARE)
    z, y, x = shape
    cells: dict[Region, Tensor] = {"body": body, "whole": valid}
    return {region: expand_cells(of_region, MAP_CELL)[:z, :y, :x] for region, of_region in cells.items()}


@dataclass
class ErrorSums:
    """Pooled errors of one volume in one region: add parts of the volume, then read the scores.

    A score over no voxel is NaN; a PSNR without any error is infinite.
    """

    window: Window
    voxels: int = 0
    hidden_voxels: int = 0
    squared: float = 0.0
    """Sum of squared errors (HU^2) over the region."""
    hidden_squared: float = 0.0
    """The same over its hidden voxels."""
    hidden_absolute: float = 0.0
    """Sum of absolute errors (HU) over its hidden voxels."""

    def add(self, reference_ZYX: Tensor, predicted_ZYX: Tensor, hidden_ZYX: Tensor, region_ZYX: Tensor) -> None:
        """Add the errors at the voxels of ``region_ZYX``; ``hidden_ZYX`` is True where the model saw nothing."""
        error = clip(predicted_ZYX[region_ZYX], self.window) - clip(reference_ZYX[region_ZYX], self.window)
        hidden_error = error[hidden_ZYX[region_ZYX]]
        self.voxels += error.numel()
        self.hidden_voxels += hidden_error.numel()
        self.squared += float(error.square().sum(dtype=torch.float64))
        self.hidden_squared += float(hidden_error.square().sum(dtype=torch.float64))
        self.hidden_absolute += float(hidden_error.abs().sum(dtype=torch.float64))

    @property
    def psnr_hidden(self) -> float:
        """PSNR (dB) over the hidden voxels."""
        return psnr(self.hidden_squared, self.hidden_voxels, self.window)

    @property
    def psnr_whole(self) -> float:
        """PSNR (dB) over all voxels, as the model put them out, visible ones included."""
        return psnr(self.squared, self.voxels, self.window)

    @property
    def psnr_pasted(self) -> float:
        """PSNR (dB) over all voxels once the visible ones are replaced by the truth: they add no error."""
        return psnr(self.hidden_squared, self.voxels, self.window)

    @property
    def mae_hu(self) -> float:
        """Mean absolute error (HU) over the hidden voxels."""
        return self.hidden_absolute / self.hidden_voxels if self.hidden_voxels else math.nan


def errors_of_groups(
    reference_ZYX: Tensor, predicted_ZYX: Tensor, hidden_ZYX: Tensor, groups: Mapping[Name, Tensor], window: Window
) -> dict[Name, ErrorSums]:
    """Return the errors in each of up to thirteen groups of voxels (bool ``[Z, Y, X]``; they may overlap) in one go."""
    codes_ZYX = codes_of([hidden_ZYX, *groups.values()])
    # How many voxels have each combination of groups, and their squared and absolute errors.
    sums = torch.zeros(3, 2 ** (1 + len(groups)), dtype=torch.float64)
    for slab in slabs(reference_ZYX.shape, reference_ZYX.device):
        error = (clip(predicted_ZYX[slab], window) - clip(reference_ZYX[slab], window)).flatten()
        codes = codes_ZYX[slab].flatten()
        weights = (None, error.square().double(), error.abs_().double())
        sums += torch.stack([torch.bincount(codes, one, minlength=sums.shape[1]).double() for one in weights]).cpu()
    hidden = with_bit(0, sums.shape[1])
    found = {}
    for bit, name in enumerate(groups, start=1):
        (voxels, squared, _), (hidden_voxels, hidden_squared, hidden_absolute) = (
            sums[:, chosen].sum(dim=1).tolist()
            for chosen in (with_bit(bit, sums.shape[1]), with_bit(bit, sums.shape[1]) & hidden)
        )
        found[name] = ErrorSums(window, int(voxels), int(hidden_voxels), squared, hidden_squared, hidden_absolute)
    return found


def codes_of(groups: Sequence[Tensor]) -> Tensor:
    """Return one number for each voxel, uint8 or int16: bit i says whether it is in group i of up to fourteen."""
    dtype = torch.uint8 if len(groups) <= 8 else torch.int16
    codes = groups[0].to(dtype)
    for bit, group in enumerate(groups[1:], start=1):
        codes |= group.to(dtype) << bit
    return codes


def with_bit(bit: int, codes: int) -> Tensor:
    """Return which of the codes 0 .. ``codes`` - 1 have a bit, bool ``[codes]``."""
    return (torch.arange(codes) >> bit) & 1 > 0


def slabs(shape: Sequence[int], device: torch.device, step: int = 1) -> Iterator[slice]:
    """Cut a volume into slabs of slices that are worked on at once, whole multiples of ``step`` slices but the last."""
    depth, of_slice = shape[0], shape[1] * shape[2]
    at_once = depth if device.type == "cuda" else max(1, _AT_ONCE // (of_slice * step)) * step
    for start in range(0, depth, at_once):
        yield slice(start, min(start + at_once, depth))


def clip(hu: Tensor, window: Window) -> Tensor:
    """Return HU as floats clipped to the window."""
    return (hu if hu.is_floating_point() else hu.float()).clamp(*window)


def psnr(squared_error: float, voxels: int, window: Window) -> float:
    """Peak signal-to-noise ratio (dB) of a pooled squared error (HU^2): ``10 log10(width^2 / mean)``."""
    if voxels == 0:
        return math.nan
    if squared_error == 0:
        return math.inf
    return 10 * math.log10((window[1] - window[0]) ** 2 * voxels / squared_error)


def patch_rmse(
    reference_ZYX: Tensor,
    predicted_ZYX: Tensor,
    hidden_ZYX: Tensor,
    region_ZYX: Tensor,
    window: Window,
    patch: Edges,
) -> Tensor:
    """Return the root mean squared error (HU, float64 ``[n]``) of each hidden patch in the region.

    Patches of which at least half the voxels count; they lie on the grid of ``patch`` voxels from voxel 0;
    how they spread tells what the pooled score averages away.
    """
    squares, counts = [], []
    for slab in slabs(reference_ZYX.shape, reference_ZYX.device, step=zyx(patch)[0]):
        counted = hidden_ZYX[slab] & region_ZYX[slab]
        error = (clip(predicted_ZYX[slab], window) - clip(reference_ZYX[slab], window)).mul_(counted)
        squares.append(_patch_sums(error.square_(), patch))
        counts.append(_patch_sums(counted.to(error.dtype), patch))
    voxels = torch.cat(counts)
    chosen = voxels >= math.prod(zyx(patch)) / 2
    return (torch.cat(squares)[chosen] / voxels[chosen]).sqrt()


@dataclass
class BorderSums:
    """Gradients across patch borders and inside patches, of one volume in one region: see `ratio`."""

    patch: Edges
    crop: Edges
    window: Window
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, 3, dtype=torch.float64))
    """Of prediction and reference: absolute steps (HU) inside patches, across borders, across seams."""

    def add(self, reference_ZYX: Tensor, predicted_ZYX: Tensor, counted_ZYX: Tensor) -> None:
        """Add all pairs of face neighbours that are both in ``counted_ZYX`` (hidden and in the region)."""
        places = border_places(self.patch, self.crop, {"whole": counted_ZYX})
        for which, volume in enumerate((predicted_ZYX, reference_ZYX)):
            self.sums[which] += step_sums(volume, places, self.window)["whole"]

    @property
    def ratio(self) -> float:
        """Mean absolute gradient across patch borders over that inside patches, over the same of the reference.

        1: no more of a grid than the anatomy has; above 1: the patches show. NaN where there is no gradient
        inside.
        """
        return self._against_inside(1)

    @property
    def seam_ratio(self) -> float:
        """The same across the seams between crops, which are predicted apart from each other."""
        return self._against_inside(2)

    def _against_inside(self, place: int) -> float:
        (predicted_inside, predicted), (reference_inside, reference) = self.sums[:, [0, place]].tolist()
        if not (predicted_inside > 0 and reference_inside > 0 and reference > 0):
            return math.nan
        # The numbers of pairs are the same for both volumes and cancel.
        return float(predicted / predicted_inside / (reference / reference_inside))


@dataclass(frozen=True)
class BorderPlaces:
    """Which pairs of face neighbours count, and where they lie; found once for all predictions of a volume."""

    groups: tuple[Region, ...]
    codes: tuple[Tensor, Tensor, Tensor]
    """For each axis uint8 of the pairs: two bits for the place (inside, border, seam), then one for each group."""


def border_places(patch: Edges, crop: Edges, groups: Mapping[Region, Tensor]) -> BorderPlaces:
    """Find the pairs of voxels of which both are in a group (bool ``[Z, Y, X]``, up to six of them).

    Patches of ``patch`` voxels and crops of ``crop`` voxels count from voxel 0 of the arrays.
    """
    voxels_ZYX = codes_of(list(groups.values()))
    codes = []
    for axis in range(3):
        size = voxels_ZYX.shape[axis]
        pairs = voxels_ZYX.narrow(axis, 0, size - 1) & voxels_ZYX.narrow(axis, 1, size - 1)
        after = torch.arange(1, size, device=pairs.device)
        border, seam = after % zyx(patch)[axis] == 0, after % zyx(crop)[axis] == 0
        place = torch.where(seam, 2, border.to(torch.uint8)).to(torch.uint8)
        codes.append((pairs << 2) | place.view([-1 if other == axis else 1 for other in range(3)]))
    return BorderPlaces(tuple(groups), (codes[0], codes[1], codes[2]))


def step_sums(volume_ZYX: Tensor, places: BorderPlaces, window: Window) -> dict[Region, Tensor]:
    """Add up the absolute steps (HU) of each group: float64 ``[3]``, inside patches, across borders, across seams."""
    sums = torch.zeros(2 ** (2 + len(places.groups)), dtype=torch.float64)
    for slab in slabs(volume_ZYX.shape, volume_ZYX.device):
        # The slice after the slab belongs to its last pairs along z.
        clipped = clip(volume_ZYX[slab.start : slab.stop + 1], window)
        own = slice(0, slab.stop - slab.start)
        for axis, codes in enumerate(places.codes):
            steps = (clipped if axis == 0 else clipped[own]).diff(dim=axis).abs_()
            found = torch.bincount(codes[slab].flatten(), steps.flatten().double(), minlength=len(sums))
            sums += found.cpu()
    by_place = sums.view(-1, 4)[:, :3]
    return {name: by_place[with_bit(bit, len(by_place))].sum(dim=0) for bit, name in enumerate(places.groups)}


def _patch_sums(voxels_ZYX: Tensor, patch: Edges) -> Tensor:
    """Add up each patch, float64 ``[z, y, x]``; what a last patch lacks counts as 0."""
    sums = voxels_ZYX
    for axis, edge in enumerate(zyx(patch)):
        missing = -sums.shape[axis] % edge
        if missing:
            zeros = sums.new_zeros([missing if i == axis else n for i, n in enumerate(sums.shape)])
            sums = torch.cat([sums, zeros], dim=axis)
        blocks = (*sums.shape[:axis], sums.shape[axis] // edge, edge, *sums.shape[axis + 1 :])
        sums = sums.reshape(blocks).sum(dim=axis + 1, dtype=torch.float64)
    return sums
