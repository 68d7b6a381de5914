"""One volume as a file that other programs take: NIfTI, NRRD, or OME-Zarr in a folder or in one file.

Voxels and metadata are checked on their way out. A file or folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import google_crc32c
import numpy as np
import SimpleITK as sitk

from maesil.atomic import named_when_whole
from maesil.errors import StoreError, UsageError
from maesil.geometry import spacing_of
from maesil.store.nifti import export_volume
from maesil.store.ome import OME_VERSION
from maesil.store.reader import SuperpatchReader
from maesil.store.records import Volume
from maesil.store.shard import decode_superpatch
from maesil.store.store import ZARR_DOCUMENT
from maesil.store.upgrade import is_current

_PARTS_OF_AN_IMAGE = ("labels/", *(f"{level}/" for level in range(32)))
_NO_DATE = (1980, 1, 1, 0, 0, 0)


def export_nrrd(reader: SuperpatchReader, volume_id: str, folder: Path) -> Path:
    """Write ``VOLUME_ID.nrrd`` (int16 HU, space left-posterior-superior in mm) into a folder; return its path."""
    volume = reader.volumes[volume_id]
    affine, spacing = volume.affine, spacing_of(volume.affine)
    image = sitk.GetImageFromArray(reader.read_region(volume_id, (0, 0, 0), volume.shape))
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetSpacing(spacing[::-1])
    image.SetDirection((affine[:3, :3] / spacing)[:, ::-1].ravel().tolist())
    path = _made(folder) / f"{volume_id}.nrrd"
    with named_when_whole(path, path.with_name(f".{uuid4().hex}.nrrd")) as partial:
        sitk.WriteImage(image, str(partial), useCompression=True)
    return path


def export_ome_zarr(reader: SuperpatchReader, volume_id: str, folder: Path) -> Path:
    """Write the folder ``VOLUME_ID.ome.zarr``, voxels, levels and labels as the store has them; return its path.

    UsageError if it is there, or if the volume is of store version 1: its metadata know no rotation.
    """
    path = _made(folder) / f"{volume_id}.ome.zarr"
    if path.exists():
        raise UsageError(f"{path}: expected no such folder yet, found one; remove it, or name another --out")
    partial = path.with_name(f".{uuid4().hex}")
    try:
        for name, data in _image_files(reader, volume_id):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(data)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def export_zipped(reader: SuperpatchReader, volume_id: str, folder: Path) -> Path:
    """Write ``VOLUME_ID.ozx``: the same in one file, by RFC-9 (nothing is compressed again); return its path."""
    path = _made(folder) / f"{volume_id}.ozx"
    told = {"ome": {"version": OME_VERSION, "zipFile": {"centralDirectory": {"jsonFirst": True}}}}
    with (
        named_when_whole(path, path.with_name(f".{uuid4().hex}.ozx")) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.comment = json.dumps(told).encode()
        for name, data in _image_files(reader, volume_id):
            with archive.open(zipfile.ZipInfo(name, _NO_DATE), "w", force_zip64=True) as member:
                member.write(data)
    return path


EXPORTS: dict[str, Callable[[SuperpatchReader, str, Path], Path]] = {
    "nifti": export_volume,
    "nrrd": export_nrrd,
    "ome-zarr": export_ome_zarr,
}
"""What a volume can become, by name."""


def _image_files(reader: SuperpatchReader, volume_id: str) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a volume's image and their bytes: metadata first, from the root down. `StoreError` on damage.

    Maps and thumbnail are maesil's own, and stay.
    """
    volume = reader.volumes[volume_id]
    if not is_current(reader.storage, volume):
        raise UsageError(
            f"{reader.storage.root}: volume {volume_id} is of store version 1, whose metadata know no rotation; "
            "run `maesil store upgrade`, or export as nifti or nrrd"
        )
    _check_voxels(reader, volume)
    keys = (key.removeprefix(f"{volume.prefix}/") for key in reader.storage.list(volume.prefix))
    names = [name for name in keys if name == ZARR_DOCUMENT or name.startswith(_PARTS_OF_AN_IMAGE)]
    for name in sorted(names, key=lambda name: (not name.endswith(ZARR_DOCUMENT), name.count("/"), name)):
        data = reader.storage.read(f"{volume.prefix}/{name}")
        if name in volume.documents and google_crc32c.value(data) != volume.documents[name]:
            raise StoreError(f"{reader.storage.root}: {volume.prefix}/{name}: damaged; run `maesil store verify`")
        yield name, data


def _check_voxels(reader: SuperpatchReader, volume: Volume) -> None:
    buffer = np.empty((volume.tile,) * 3, dtype=np.int16)
    for patch in volume.superpatches:
        where = f"{reader.storage.root}: volume {volume.volume_id}, superpatch {patch.index}"
        decode_superpatch(reader.storage, patch, volume.codec, buffer, where)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UsageError(f"{folder}: expected a folder to write volumes into ({error.strerror})") from error
    return folder
