"""The ``valid`` and ``body`` maps: what share of each 8^3 cell lies inside the scan, and inside the patient.

Real scans are 2 to 84 % padding, and about a third of the patches of a superpatch grid hold body: without these maps,
padding and air would decide every loss and every score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.ingest.separable import apply_maps
from maesil.types import MAP_CELL, MapArray, Planes, Spacing

_TISSUE_ABOVE_HU = -400
_COARSE_MM = 3.1
_OPENING_MM = 6.0
_FULL = 255


def valid_map(valid: Planes) -> MapArray:
    """Return the share, 0..255, of valid voxels in each cell; voxels beyond the volume count as not valid."""
    return _quantise(_block_mean(valid, (MAP_CELL,) * 3))


def body_map(hu: Planes, valid: MapArray, spacing: Spacing) -> MapArray:
    """Return the share, 0..255, of body in each cell: the largest piece of tissue, table removed, lungs filled.

    Found on voxels merged to about 3 mm, which is as fine as shares of 8^3 cells need.
    """
    factor = tuple(max(f for f in (1, 2, 4, 8) if f == 1 or f * mm <= _COARSE_MM) for mm in spacing)
    coarse = _block_mean(hu, factor, beyond="edge")
    body = _body_mask(coarse > _TISSUE_ABOVE_HU, tuple(f * mm for f, mm in zip(factor, spacing, strict=True)))
    share = _block_mean(body, tuple(MAP_CELL // f for f in factor))
    cells = np.zeros(valid.shape, dtype=np.uint8)
    found = _quantise(share)[tuple(slice(0, n) for n in valid.shape)]
    cells[tuple(slice(0, n) for n in found.shape)] = found
    return np.minimum(cells, valid)


def _body_mask(tissue: NDArray[np.bool_], spacing: tuple[float, ...]) -> NDArray[np.bool_]:
    ball = _ball([max(1, round(_OPENING_MM / mm)) for mm in spacing])
    # Opening cuts the thin shells of a table and the bridges to it.
    opened = dilate(~dilate(~tissue, ball), ball)
    parts = sitk.ConnectedComponent(sitk.GetImageFromArray(opened.astype(np.uint8)))
    largest = sitk.GetArrayFromImage(sitk.RelabelComponent(parts, sortByObjectSize=True)) == 1
    # The skin that the opening took comes back, the table does not.
    return fill_slice_by_slice(dilate(largest, ball) & tissue)


def _ball(radius: Sequence[int]) -> NDArray[np.bool_]:
    """Return SimpleITK's ball: what it makes of a single voxel."""
    point = np.zeros([2 * r + 1 for r in radius], dtype=np.uint8)
    point[tuple(radius)] = 1
    grown = sitk.BinaryDilate(sitk.GetImageFromArray(point), [int(r) for r in reversed(radius)], sitk.sitkBall)
    return np.asarray(sitk.GetArrayFromImage(grown) > 0)


def dilate(mask: NDArray[np.bool_], ball: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the mask grown by a ball (symmetric, convex, of odd size); nothing lies beyond the volume.

    A ball is a bundle of runs along x. Growing along x once for each length of run, and then moving whole volumes, is
    many times faster than SimpleITK's dilation.
    """
    radius = [n // 2 for n in ball.shape]
    padded = np.pad(mask, [(r, r) for r in radius])
    run = grown = padded.ravel()
    grown = np.zeros_like(run)
    _, height, width = padded.shape
    margin = (radius[0] * height + radius[1]) * width + radius[2]
    inner = slice(margin, run.size - margin)
    half_lengths = (ball.sum(axis=2, dtype=int) - 1) // 2  # of the run in each row of the ball; -1 for none
    for half in range(radius[2] + 1):
        run = _or_moved(run, half)
        for dz, dy in np.argwhere(half_lengths == half) - radius[:2]:
            move = int(dz * height + dy) * width
            grown[inner] |= run[margin + move : run.size - margin + move]
    unpadded = tuple(slice(r, r + n) for r, n in zip(radius, mask.shape, strict=True))
    return np.ascontiguousarray(grown.reshape(padded.shape)[unpadded])


def _or_moved(run: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """Return a flat mask with itself moved by one to either side, unless ``by`` is 0."""
    if not by:
        return run
    wider = run.copy()
    wider[1:] |= run[:-1]
    wider[:-1] |= run[1:]
    return wider


def fill_slice_by_slice(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill the holes of each axial slice by itself: lungs are closed in the axial plane, not at the ends of a scan.

    One call for all is far faster than one per slice: full slices between them keep them apart, and a frame around them
    makes all that is outside one piece.
    """
    count, height, width = mask.shape
    background = np.zeros((2 * count + 1, height + 2, width + 2), dtype=np.uint8)
    background[:, [0, -1], :] = background[:, :, [0, -1]] = 1
    background[1::2, 1:-1, 1:-1] = ~mask
    pieces = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(background)))
    return np.asarray(pieces[1::2, 1:-1, 1:-1] != pieces[0, 0, 0])


def _block_mean(values: Planes, block: tuple[int, ...], beyond: str = "constant") -> NDArray[np.float32]:
    """Return the means of blocks; beyond the volume lie zeros, or (``edge``) its outermost voxels again."""
    z, y, x = (_pooling(size, edge, beyond) for size, edge in zip(values.shape, block, strict=True))
    return apply_maps((z, y, x), values)


def _pooling(size: int, block: int, beyond: str) -> NDArray[np.float32]:
    padded = np.pad(np.eye(size, dtype=np.float32), [(0, -size % block), (0, 0)], mode=beyond)  # type: ignore[call-overload]
    return np.asarray(padded.reshape(-1, block, size).mean(axis=1, dtype=np.float32))


def _quantise(share: NDArray[np.float32]) -> MapArray:
    """Round shares to 0..255 so that only a full cell is 255 and only an empty one 0."""
    cells = np.rint(share * _FULL)
    cells = np.where(share < 1, np.minimum(cells, _FULL - 1), cells)
    return np.where(share > 0, np.maximum(cells, 1), cells).astype(np.uint8)
