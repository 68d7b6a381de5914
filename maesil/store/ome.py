"""What the images of a store say in OME-Zarr: where their voxels lie, how they are shown; and what such words mean.

OME-Zarr 0.6, sections "coordinateSystems", "coordinateTransformations", "multiscales", "omero"; RFC-4 for the
orientation of axes. Version 1 of the store format wrote OME-Zarr 0.5, which is still read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maesil.geometry import Affine, spacing_of
from maesil.store.pyramid import Level
from maesil.types import AIR_HU, Spacing

OME_VERSION = "0.6"
GRID = "grid"
"""Coordinate system of an image: mm along the axes of its arrays, from where the first voxel lies in the patient."""
LPS = "lps"
"""Coordinate system of the patient: mm to Superior, Posterior, Left for z, y, x."""
_ORIENTATION = {"z": "inferior-to-superior", "y": "anterior-to-posterior", "x": "right-to-left"}
_HIGHEST_HU = 3071
_SOFT_TISSUE = (-160, 240)
_RIGHT_ANGLED = 1e-9
_ROUNDING = 1e-12
_REVERSED = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=np.float64)

Attributes = dict[str, Any]


def image_attributes(name: str, affine: Affine, levels: Sequence[Level], *, oriented: bool = True) -> Attributes:
    """Return the attributes of an image group with the levels below level 0 that it has.

    ``affine`` takes ``[z, y, x, 1]`` of level 0 to LPS mm. An animal on four legs is not ``oriented``: RFC-4 has other
    words for it.
    """
    scales = multiscales(name, affine, levels, oriented=oriented)
    method = "of each block of voxels the mean of the valid ones; -1024 HU where there is none"
    scales |= {"type": "mean", "metadata": {"description": method}}
    low, high = _SOFT_TISSUE
    channel = {
        "label": "CT (HU)",
        "active": True,
        "color": "FFFFFF",
        "window": {"min": AIR_HU, "max": _HIGHEST_HU, "start": low, "end": high},
    }
    shown = {"channels": [channel], "rdefs": {"model": "greyscale"}}
    return {"ome": {"version": OME_VERSION, "multiscales": [scales], "omero": shown}}


def multiscales(name: str, affine: Affine, levels: Sequence[Level], *, oriented: bool = True) -> Attributes:
    """Return the ``multiscales`` entry of an image or a label image: its coordinate systems and levels."""
    spacing, origin = spacing_of(affine), affine[2::-1, 3]
    factors = [(1, 1, 1), *(level.factors for level in levels)]
    systems = [{"name": system, "axes": [_axis(axis, oriented) for axis in "zyx"]} for system in (GRID, LPS)]
    return {
        "name": name,
        "coordinateSystems": systems,
        "datasets": [_dataset(str(n), spacing, origin, by) for n, by in enumerate(factors)],
        "coordinateTransformations": [_to_lps(affine) | {"input": {"name": GRID}, "output": {"name": LPS}}],
    }


def affine_of(attributes: Mapping[str, Any]) -> Affine:
    """Return where level 0 of an image lies by its attributes alone: ``[z, y, x, 1]`` to LPS mm.

    ValueError (KeyError, TypeError, IndexError) for what is no image of a store.
    """
    ome = attributes["ome"]
    scales = ome["multiscales"][0]
    steps = [*scales["datasets"][0]["coordinateTransformations"]]
    if ome["version"] == OME_VERSION:
        steps += scales["coordinateTransformations"]
    elif ome["version"] != "0.5":
        raise ValueError(f"expected OME-Zarr 0.5 or {OME_VERSION}, found {ome['version']}")
    matrix = np.eye(4)
    for step in steps:
        matrix = _matrix(step) @ matrix
    affine = np.eye(4)
    affine[:3] = _REVERSED @ matrix[:3]
    return affine


def ome_version(attributes: Mapping[str, Any]) -> str:
    """Return the version of OME-Zarr that a group speaks."""
    return str(attributes["ome"]["version"])


def level_paths(attributes: Mapping[str, Any]) -> list[str]:
    """Return the names of an image's arrays, the finest first."""
    return [str(level["path"]) for level in attributes["ome"]["multiscales"][0]["datasets"]]


def _axis(name: str, oriented: bool) -> Attributes:
    axis = {"name": name, "type": "space", "unit": "millimeter"}
    return axis | ({"orientation": {"type": "anatomical", "value": _ORIENTATION[name]}} if oriented else {})


def _dataset(path: str, spacing: Spacing, origin: NDArray[np.float64], factors: Sequence[int]) -> Attributes:
    """Return one level: a voxel's centre is that of the voxels of level 0 that became it."""
    scale = [mm * n for mm, n in zip(spacing, factors, strict=True)]
    first = [float(at) + mm * (n - 1) / 2 for at, mm, n in zip(origin, spacing, factors, strict=True)]
    steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": first}]
    whole = {"type": "sequence", "input": {"path": path}, "output": {"name": GRID}, "transformations": steps}
    return {"path": path, "coordinateTransformations": [whole]}


def _to_lps(affine: Affine) -> Attributes:
    """Return how `GRID` becomes `LPS`: the first voxel stays, the axes turn; by the plainest words that say it."""
    origin = affine[2::-1, 3]
    turn = (_REVERSED @ affine[:3, :3]) / spacing_of(affine)
    if np.allclose(turn, np.eye(3), rtol=0, atol=_ROUNDING):
        return {"type": "identity"}
    shift = origin - turn @ origin
    right_angled = np.abs(turn.T @ turn - np.eye(3)).max() < _RIGHT_ANGLED and np.linalg.det(turn) > 0
    if right_angled:
        turned = {"type": "rotation", "rotation": turn.tolist()}
        moved = {"type": "translation", "translation": shift.tolist()}
        return {"type": "sequence", "transformations": [turned, moved]}
    return {"type": "affine", "affine": np.column_stack([turn, shift]).tolist()}


def _matrix(step: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return one of the transformations that a store writes as a 4x4 matrix."""
    matrix, kind = np.eye(4), step["type"]
    if kind == "scale":
        matrix[:3, :3] = np.diag(step["scale"])
    elif kind == "translation":
        matrix[:3, 3] = step["translation"]
    elif kind == "rotation":
        matrix[:3, :3] = step["rotation"]
    elif kind == "affine":
        matrix[:3] = step["affine"]
    elif kind == "sequence":
        for inner in step["transformations"]:
            matrix = _matrix(inner) @ matrix
    elif kind != "identity":
        raise ValueError(f"expected a transformation that a store writes, found {kind!r}")
    return matrix
