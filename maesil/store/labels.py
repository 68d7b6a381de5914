"""Segmentations beside a volume's voxels: label images of OME-Zarr, below ``labels/`` of its attempt.

OME-Zarr 0.6, section "labels". A label image lies on the grid of its volume and has as many levels.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from maesil.documents import canonical_json
from maesil.errors import StoreError, UsageError
from maesil.store.amend import amended
from maesil.store.ome import OME_VERSION, multiscales
from maesil.store.pyramid import levels_below
from maesil.store.records import Volume
from maesil.store.shard import tiles_per_shard
from maesil.store.store import ZARR_DOCUMENT, Store
from maesil.store.upgrade import is_current
from maesil.types import MapArray

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FOLDER = "labels"
_GOLDEN = 0.618034
"""Steps of this much around the circle of hues give neighbours colours that are told apart."""


def add_label_image(
    store: Store, volume: Volume, name: str, labels: MapArray, classes: Sequence[str], unlabelled: int
) -> Volume | None:
    """Commit a volume with one more label image, or another one of this name; None if it was committed meanwhile.

    ``labels``: uint8 of the volume's shape: 0 is background, ``classes[k - 1]`` the name of number k, and
    ``unlabelled`` the number of voxels that nobody labelled. UsageError for another shape, a name that is none, or a
    volume as store version 1 has it.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"--name: expected letters, digits, '_' and '-', found {name!r}")
    if labels.shape != volume.shape:
        raise UsageError(
            f"{store.path}: expected labels of the shape {volume.shape} of volume {volume.volume_id}, "
            f"found {labels.shape}"
        )
    if not is_current(store.storage, volume):
        raise UsageError(
            f"{store.path}: volume {volume.volume_id} is of store version 1, which has no labels; "
            "run `maesil store upgrade` first"
        )
    anew = (f"{_FOLDER}/{ZARR_DOCUMENT}", f"{_FOLDER}/{name}/")
    attributes = _attributes(volume, name, classes, unlabelled)
    return amended(store, volume, anew, partial(_write, store, volume, name, labels, attributes))


def label_names(volume: Volume) -> list[str]:
    """Return the names of a volume's label images."""
    parts = (document.split("/") for document in volume.documents)
    return sorted(part[1] for part in parts if len(part) == 3 and (part[0], part[2]) == (_FOLDER, ZARR_DOCUMENT))


@dataclass(frozen=True)
class LabelImage:
    """A segmentation on the grid of its volume."""

    labels: MapArray
    """uint8 ``[z, y, x]``; 0 is background."""
    classes: dict[int, str]
    """What each number stands for."""
    colours: dict[int, list[int]]
    """Red, green, blue and opacity, 0..255, of numbers that have a colour."""


def read_label_image(store: Store, volume: Volume, name: str) -> LabelImage:
    """Return one of a volume's label images, at its finest level; `StoreError` where it is not what was committed."""
    folder = f"{_FOLDER}/{name}"
    try:
        for key, crc32c in volume.documents.items():
            here = key.startswith(f"{folder}/0/") or key == f"{folder}/{ZARR_DOCUMENT}"
            if here and google_crc32c.value(store.storage.read(f"{volume.prefix}/{key}")) != crc32c:
                raise ValueError(f"{key}: checksum mismatch")
        group = zarr.open_group(store.storage.zarr(f"{volume.prefix}/{folder}", read_only=True), mode="r")
        told: Any = group.attrs["ome"]
        colours = {one["label-value"]: one["rgba"] for one in told["image-label"]["colors"]}
        classes = {one["label-value"]: one["class"] for one in told["image-label"]["properties"]}
        return LabelImage(np.asarray(group["0"][...], dtype=np.uint8), classes, colours)  # type: ignore[index]
    except (ValueError, RuntimeError, LookupError, TypeError, OSError) as error:
        raise StoreError(f"{store.path}: volume {volume.volume_id}, labels {name!r}: damaged ({error})") from error


def _write(store: Store, volume: Volume, name: str, labels: MapArray, attributes: dict[str, Any], prefix: str) -> None:
    names = sorted({*label_names(volume), name})
    listed = {"ome": {"version": OME_VERSION, "labels": names}}
    document = canonical_json({"zarr_format": 3, "node_type": "group", "attributes": listed})
    store.storage.put(f"{prefix}/{_FOLDER}/{ZARR_DOCUMENT}", document)
    group = zarr.create_group(store.storage.zarr(f"{prefix}/{_FOLDER}/{name}", read_only=False), attributes=attributes)
    _write_level(store, volume, group, "0", labels)
    for number, level in enumerate(levels_below(volume.shape, volume.spacing), start=1):
        # All voxels of a block are as near to its centre: the first stands for it.
        z, y, x = level.halved
        labels = labels[::z, ::y, ::x]
        _write_level(store, volume, group, str(number), labels)


def _write_level(store: Store, volume: Volume, group: zarr.Group, name: str, labels: MapArray) -> None:
    z, y, x = (-(-n // volume.tile) for n in labels.shape)
    array = group.create_array(
        name,
        shape=labels.shape,
        chunks=(volume.tile,) * 3,
        shards=tuple(n * volume.tile for n in tiles_per_shard((z, y, x))),
        dtype="uint8",
        fill_value=0,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        dimension_names=("z", "y", "x"),
        config={"write_empty_chunks": True},
    )
    array[...] = np.ascontiguousarray(labels)
    if not np.array_equal(array[...], labels):
        raise StoreError(f"{store.path}: labels of volume {volume.volume_id}: read back others than were written")


def _attributes(volume: Volume, name: str, classes: Sequence[str], unlabelled: int) -> dict[str, Any]:
    levels = levels_below(volume.shape, volume.spacing)
    scales = multiscales(name, volume.affine, levels, oriented=volume.oriented)
    scales |= {"type": "nearest", "metadata": {"description": "of each block of voxels the first"}}
    named = dict(enumerate(classes, start=1))
    told = {
        "colors": [{"label-value": number, "rgba": _colour(number)} for number in named]
        + [{"label-value": unlabelled, "rgba": [0, 0, 0, 0]}],
        "properties": [{"label-value": number, "class": label} for number, label in named.items()]
        + [{"label-value": unlabelled, "class": "not labelled"}],
        "source": {"image": "../../"},
    }
    return {"ome": {"version": OME_VERSION, "multiscales": [scales], "image-label": told}}


def _colour(number: int) -> list[int]:
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1.0, 0.8, 0.95)
    return [round(255 * red), round(255 * green), round(255 * blue), 255]
