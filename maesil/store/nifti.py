"""A volume of a store as NIfTI, every voxel where it was in the patient."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import nibabel as nib
import numpy as np

from maesil.atomic import named_when_whole
from maesil.errors import UsageError
from maesil.geometry import Affine, to_nifti
from maesil.store.reader import SuperpatchReader
from maesil.types import HuArray, MapArray

_SCANNER_COORDINATES = 1


def export_volume(reader: SuperpatchReader, volume_id: str, folder: Path) -> Path:
    """Write ``VOLUME_ID.nii.gz`` (int16 HU, RAS affine in mm) into a folder; return its path."""
    volume = reader.volumes[volume_id]
    path = folder / f"{volume_id}.nii.gz"
    write_nifti(path, reader.read_region(volume_id, (0, 0, 0), volume.shape), volume.affine)
    return path


def nifti_image(voxels: HuArray | MapArray, affine: Affine) -> nib.Nifti1Image:
    """Return one ``[z, y, x]`` array (int16 HU, or uint8 of a map) with its LPS affine as a NIfTI image."""
    image = nib.Nifti1Image(np.asarray(voxels).transpose(2, 1, 0), to_nifti(affine))
    image.set_sform(to_nifti(affine), code=_SCANNER_COORDINATES)
    # A qform cannot hold shear; where there is any, the sform alone speaks.
    image.set_qform(to_nifti(affine), code=_SCANNER_COORDINATES)
    if not np.allclose(image.get_qform(), to_nifti(affine), atol=1e-3):
        image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    return image


def write_nifti(path: Path, hu: HuArray, affine: Affine) -> None:
    """Write one ``[z, y, x]`` array with its LPS affine as NIfTI; the file appears whole or not at all."""
    image = nifti_image(hu, affine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UsageError(f"{path.parent}: expected a folder to write NIfTI files into ({error.strerror})") from error
    # By its ending nibabel knows what to write.
    with named_when_whole(path, path.with_name(f".{uuid4().hex}.nii.gz")) as partial:
        nib.save(image, partial)
