"""Pictures of a volume for people: a plane through its middle, in grey."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume

_WINDOW_HU = (-1000.0, 1000.0)
_GAMMA = 0.8


def middle_plane(volume: Volume, reader: SuperpatchReader, axis: int) -> NDArray[np.int16]:
    """Return the middle plane across an axis (0, 1, 2 for z, y, x), HU; superpatches it misses are not read."""
    start = [volume.shape[n] // 2 if n == axis else 0 for n in range(3)]
    size = [1 if n == axis else volume.shape[n] for n in range(3)]
    cut = reader.read_region(volume.volume_id, (start[0], start[1], start[2]), (size[0], size[1], size[2]))
    return cut.squeeze(axis)


def grey_png(plane: NDArray[np.int16], width: int, height: int) -> bytes:
    """Return a plane of HU as a PNG of this size (pixels), lungs and bone both to be seen."""
    low, high = _WINDOW_HU
    grey = np.clip((plane.astype(np.float32) - low) / (high - low), 0, 1) ** _GAMMA
    buffer = io.BytesIO()
    Image.fromarray(np.rint(grey * 255).astype(np.uint8)).resize((width, height)).save(buffer, format="png")
    return buffer.getvalue()
