"""The ``valid`` and ``body`` maps: what share of each 8^3 cell lies inside the scan, and inside the patient.

Real scans are 2 to 84 % padding, and about a third of the patches of a superpatch grid hold body: without these maps,
padding and air would decide every loss and every score.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from maesil.types import AIR_HU, MAP_CELL, HuArray, MapArray, Spacing

_TISSUE_ABOVE_HU = -400
_COARSE_MM = 3.1
_OPENING_MM = 6.0
_FULL = 255


def valid_map(valid: NDArray[np.bool_]) -> MapArray:
    """Return the share, 0..255, of valid voxels in each cell; voxels beyond the volume count as not valid."""
    return _quantise(_block_mean(valid.astype(np.float32), (MAP_CELL,) * 3, fill=0.0))


def body_map(hu: HuArray, valid: MapArray, spacing: Spacing) -> MapArray:
    """Return the share, 0..255, of body in each cell: the largest piece of tissue, table removed, lungs filled.

    Found on voxels merged to about 3 mm, which is as fine as shares of 8^3 cells need.
    """
    factor = tuple(max(f for f in (1, 2, 4, 8) if f == 1 or f * mm <= _COARSE_MM) for mm in spacing)
    whole = np.pad(hu, [(0, -n % f) for n, f in zip(hu.shape, factor, strict=True)], mode="edge")
    coarse = _block_mean(whole.astype(np.float32), factor, fill=float(AIR_HU))
    body = _body_mask(coarse > _TISSUE_ABOVE_HU, tuple(f * mm for f, mm in zip(factor, spacing, strict=True)))
    share = _block_mean(body.astype(np.float32), tuple(MAP_CELL // f for f in factor), fill=0.0)
    cells = np.zeros(valid.shape, dtype=np.uint8)
    found = _quantise(share)[tuple(slice(0, n) for n in valid.shape)]
    cells[tuple(slice(0, n) for n in found.shape)] = found
    return np.minimum(cells, valid)


def _body_mask(tissue: NDArray[np.bool_], spacing: tuple[float, ...]) -> NDArray[np.bool_]:
    image = sitk.GetImageFromArray(tissue.astype(np.uint8))
    radius = [max(1, round(_OPENING_MM / mm)) for mm in reversed(spacing)]
    # Opening cuts the thin shells of a table and the bridges to it.
    opened = sitk.BinaryMorphologicalOpening(image, radius, sitk.sitkBall)
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(opened), sortByObjectSize=True)
    largest = parts == 1
    # The skin that the opening took comes back, the table does not.
    grown = sitk.And(sitk.BinaryDilate(largest, radius, sitk.sitkBall), image)
    return _filled_slice_by_slice(sitk.GetArrayFromImage(grown) > 0)


def _filled_slice_by_slice(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill the holes of each axial slice by itself: lungs are closed in the axial plane, not at the ends of a scan.

    One call for all is far faster than one a slice: full slices between them keep them apart.
    """
    apart = np.ones((2 * len(mask) + 1, *mask.shape[1:]), dtype=np.uint8)
    apart[1::2] = mask
    return np.asarray(sitk.GetArrayFromImage(sitk.BinaryFillhole(sitk.GetImageFromArray(apart)))[1::2] > 0)


def _block_mean(values: NDArray[np.float32], block: tuple[int, ...], fill: float) -> NDArray[np.float32]:
    padded = np.pad(values, [(0, -n % b) for n, b in zip(values.shape, block, strict=True)], constant_values=fill)
    split = [part for n, b in zip(padded.shape, block, strict=True) for part in (n // b, b)]
    return np.asarray(padded.reshape(split).mean(axis=(1, 3, 5), dtype=np.float32))


def _quantise(share: NDArray[np.float32]) -> MapArray:
    """Round shares to 0..255 so that only a full cell is 255 and only an empty one 0."""
    cells = np.rint(share * _FULL)
    cells = np.where(share < 1, np.minimum(cells, _FULL - 1), cells)
    return np.where(share > 0, np.maximum(cells, 1), cells).astype(np.uint8)
