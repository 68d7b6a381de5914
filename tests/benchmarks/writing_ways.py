"""Ways to write superpatches, ours and other people's: some volumes of whole ones, synced to the disk.

Part of `reading_ways.py`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

EDGE = 128
Round = Callable[[], int]
"""Does some work; returns how many superpatches it was."""


def _write(data: dict[str, Any], save: Callable[[np.ndarray, Path], None]) -> Round:
    volumes = [np.load(path) for path in data["to_write"]]

    def write() -> int:
        folder = Path(tempfile.mkdtemp(dir=data["work"]))
        started = time.perf_counter()
        for number, volume in enumerate(volumes):
            save(volume, folder / f"v{number}")
        _sync(folder)
        write.seconds = time.perf_counter() - started  # type: ignore[attr-defined]
        shutil.rmtree(folder)
        return sum(volume.size for volume in volumes) // EDGE**3

    return write


def _sync(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_maesil(threads: int) -> Callable[[dict[str, Any]], Round]:
    """Write as ingest does: superpatches, maps and thumbnail, synced, everything read back and compared."""

    def prepare(data: dict[str, Any]) -> Round:
        from maesil.store.local_storage import LocalStorage
        from maesil.store.writer import Image, write_attempt

        def save(volume: np.ndarray, path: Path) -> None:
            cells = np.full([n // 8 for n in volume.shape], 255, np.uint8)
            image = Image(hu=volume, affine=np.eye(4), valid=cells, body=cells)
            store, volume_id = LocalStorage(path.parent), path.name * 8
            write_attempt(store, volume_id, "attempt", image, tile=EDGE, codec="fast", threads=threads)

        return _write(data, save)

    return prepare


def _superpatches_of(volume: np.ndarray) -> Iterator[np.ndarray]:
    for z, y, x in np.ndindex(*(n // EDGE for n in volume.shape)):
        yield volume[tuple(slice(i * EDGE, (i + 1) * EDGE) for i in (z, y, x))]


def write_monai(data: dict[str, Any]) -> Round:
    """Write each superpatch as `PersistentDataset` does: a float32 tensor through torch.save."""
    from monai.data import PersistentDataset

    def save(volume: np.ndarray, path: Path) -> None:
        items = list(_superpatches_of(volume))
        keys = iter(range(len(items)))
        cached = PersistentDataset(
            items, lambda a: a.astype(np.float32)[None], cache_dir=path, hash_func=lambda _: str(next(keys)).encode()
        )
        for number in range(len(items)):
            cached[number]

    return _write(data, save)


def write_nnunet(data: dict[str, Any]) -> Round:
    return _write(data, save_nnunet)


def save_nnunet(array: np.ndarray, name: Path) -> None:
    """Save as nnU-Net's preprocessing does: float32, LZ4HC, chunks and blocks for this patch size; an empty label."""
    from nnunetv2.training.dataloading import nnunet_dataset as nnunet

    image = array[None].astype(np.float32)
    blocks, chunks = nnunet.comp_blosc2_params(image.shape, (EDGE,) * 3, image.itemsize)
    label = np.zeros(image.shape, np.int8)
    properties = {"class_locations": {}}
    nnunet.nnUNetDatasetBlosc2.save_case(image, label, properties, str(name), chunks=chunks, blocks=blocks)


WRITING = {
    "maesil write": write_maesil(threads=2),
    "maesil write, one thread": write_maesil(threads=1),
    "MONAI write": write_monai,
    "nnU-Net write": write_nnunet,
}
