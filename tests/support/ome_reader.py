"""What ngff-zarr, which knows nothing of maesil, says of an image: its levels, and where their voxels lie."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import ngff_zarr
import numpy as np


class OmeImage:
    """An image of OME-Zarr 0.6, validated by the schemas of its specification."""

    def __init__(self, path: Path) -> None:
        self.read = ngff_zarr.from_ome_zarr(str(path), validate=True)
        (to_lps,) = self.read.metadata.coordinateTransformations
        assert (to_lps.input.name, to_lps.output.name) == ("grid", "lps")
        # The axes' orientations are those of LPS, so the images themselves need not be given.
        (transform,) = ngff_zarr.ngff_transform_to_itk_transform(to_lps, ("z", "y", "x"))
        numbers = np.asarray(transform.parameters, np.float64)
        self._turn, self._shift = numbers[:9].reshape(3, 3), numbers[9:]

    def lps(self, index: Sequence[float], level: int = 0) -> np.ndarray:
        """LPS position (x, y, z; mm) of a voxel (z, y, x) of a level."""
        image = self.read.images[level]
        grid = [image.scale[axis] * i + image.translation[axis] for axis, i in zip("zyx", index, strict=True)]
        return self._turn @ grid[::-1] + self._shift

    def corners(self, level: int = 0) -> np.ndarray:
        """LPS positions ``[8, 3]`` of the corner voxels of a level, sorted."""
        shape = self.read.images[level].data.shape
        return in_order(np.array([self.lps(index, level) for index in product(*((0, n - 1) for n in shape))]))

    def hu(self, level: int = 0) -> np.ndarray:
        """The voxels of a level."""
        return np.asarray(self.read.images[level].data)


def in_order(points: np.ndarray) -> np.ndarray:
    """Points ``[n, 3]`` in an order that does not depend on how they were found."""
    return points[np.lexsort(np.round(points, 2).T)]
