"""Reading Enhanced (multi-frame) CT by highdicom's geometry and functional-group rules (PS3.3 A.38, C.7.6.16)."""

from __future__ import annotations

import sqlite3
import warnings
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np

from maesil.errors import Refused
from maesil.ingest.dicom import technical_tags
from maesil.ingest.scanned import Scanned
from maesil.types import AIR_HU


def read_enhanced(path: Path) -> Scanned:
    """Return the volume of one multi-frame instance; `Refused` if its frames are no regular stack."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = hd.imread(path)
            geometry = image.get_volume_geometry(allow_duplicate_positions=False)
        except (ValueError, AttributeError, TypeError, KeyError, RuntimeError, sqlite3.Error) as error:
            raise Refused("bad_enhanced", f"the frames' functional groups cannot be read ({error})") from error
        if geometry is None:
            raise Refused("irregular_frames", "expected frames at equal steps, one a position; found gaps or repeats")
        hu = _volume(image, hu=True)
        stored = _volume(image, hu=False).array
    affine = np.eye(4)
    affine[:3] = hu.affine[:3]
    valid = ~_padding(image, stored, hu.array)
    values = hu.array.astype(np.float32)
    values[~valid] = AIR_HU
    source = {"kind": "dicom", "enhanced": True, **technical_tags(image)}
    return Scanned(hu=values, valid=valid, affine=affine, notes=(), source=source)


def _volume(image: Any, *, hu: bool) -> Any:
    """Return highdicom's volume, sorted by position; the display transforms stay off (they would invert HU)."""
    try:
        return image.get_volume(
            dtype=np.float64,
            apply_real_world_transform=False,
            apply_modality_transform=None if hu else False,
            apply_voi_transform=False,
            apply_presentation_lut=False,
        )
    except Exception as error:  # decoders raise anything; frames that do not decode cost one volume
        raise Refused("bad_pixels", f"the frames cannot be decoded ({type(error).__name__}: {error})") from error


def _padding(image: Any, stored: Any, hu: Any) -> Any:
    value = image.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    where = stored == int(value)
    # As for single slices: a padding value that lies among tissue is not believed.
    return where if not where.any() or hu[where].max() <= -900 else np.zeros(stored.shape, dtype=bool)
