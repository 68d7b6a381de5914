"""How other people's readers read a folder of DICOM or NIfTI; run by `compare_readers.py` in the peers' environment.

    PYTHON peer_readers.py PEER CASES OUT

For each folder of CASES it writes OUT/NAME.npz with the volumes read (``hu0``, ``affine0``...: axes and affine as
``order`` says), or OUT/NAME.json with the error. A folder already there is left out, so that a crash costs one folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Volume = tuple[np.ndarray, np.ndarray]
"""HU and affine; axes x y z and RAS for those that speak NIfTI, z y x and LPS for those that speak DICOM."""


def folders_with_files(folder: Path) -> list[Path]:
    return [Path(base) for base, _, files in sorted(os.walk(folder)) if files]


def simpleitk(folder: Path) -> Iterator[Volume]:
    import SimpleITK as sitk

    for base in folders_with_files(folder):
        for series in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(base)):
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(base), series))
            image = reader.Execute()
            affine = np.eye(4)
            affine[:3, :3] = (np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing())[:, ::-1]
            affine[:3, 3] = image.GetOrigin()
            yield sitk.GetArrayFromImage(image), affine


def highdicom(folder: Path) -> Iterator[Volume]:
    import highdicom as hd
    import pydicom

    series = defaultdict(list)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            data = pydicom.dcmread(path)
        except pydicom.errors.InvalidDicomError:
            continue
        if "NumberOfFrames" in data:
            yield _of_highdicom(hd.imread(path).get_volume(apply_presentation_lut=False))
        else:
            series[data.get("PatientID"), data.get("StudyInstanceUID"), data.SeriesInstanceUID].append(data)
    for slices in series.values():
        if len(slices) > 1:
            yield _of_highdicom(hd.get_volume_from_series(slices, apply_presentation_lut=False))


def _of_highdicom(volume) -> Volume:
    return np.asarray(volume.array), np.asarray(volume.affine)


def dicom2nifti(folder: Path) -> Iterator[Volume]:
    import dicom2nifti
    import nibabel as nib

    out = Path(tempfile.mkdtemp())
    try:
        dicom2nifti.convert_directory(str(folder), str(out), compression=False, reorient=False)
        for path in sorted(out.glob("*.nii")):
            image = nib.load(path)
            yield np.asarray(image.dataobj), image.affine
    finally:
        shutil.rmtree(out)


def _monai(folder: Path, reader: str) -> Iterator[Volume]:
    from monai.transforms import LoadImage

    for base in folders_with_files(folder):
        image = LoadImage(reader=reader)(str(base))
        yield image.numpy(), image.affine.numpy()


def monai_itk(folder: Path) -> Iterator[Volume]:
    yield from _monai(folder, "ITKReader")


def monai_pydicom(folder: Path) -> Iterator[Volume]:
    yield from _monai(folder, "PydicomReader")


def torchio(folder: Path) -> Iterator[Volume]:
    import torchio

    for base in folders_with_files(folder):
        image = torchio.ScalarImage(base)
        yield image.data[0].numpy(), image.affine


def nifti_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.name.lower().endswith((".nii", ".nii.gz", ".hdr", ".hdr.gz"))]


def _each(folder: Path, read: Callable[[Path], Iterator[Volume]]) -> Iterator[Volume]:
    """Read every file by itself: one that is refused takes none of the others with it, unless all are."""
    error, found = None, 0
    for path in nifti_files(folder):
        try:
            volumes = list(read(path))
        except Exception as raised:
            error = raised
            continue
        found += len(volumes)
        yield from volumes
    if error is not None and not found:
        raise error


def _along_fourth_axis(hu: np.ndarray, affine: np.ndarray) -> Iterator[Volume]:
    """Give a reader of four axes credit for each of the volumes."""
    volumes = [hu[..., n] for n in range(hu.shape[3])] if hu.ndim == 4 else [hu]
    yield from ((volume, affine) for volume in volumes)


def simpleitk_image(folder: Path) -> Iterator[Volume]:
    import SimpleITK as sitk

    def read(path: Path) -> Iterator[Volume]:
        image = sitk.ReadImage(str(path))
        dimension = image.GetDimension()
        directions = np.reshape(image.GetDirection(), (dimension, dimension))[:3, :3]
        affine = np.eye(4)
        affine[:3, :3] = directions * image.GetSpacing()[:3]
        affine[:3, 3] = image.GetOrigin()[:3]
        hu = sitk.GetArrayFromImage(image)
        axes = range(hu.ndim)[::-1] if image.GetNumberOfComponentsPerPixel() == 1 else range(hu.ndim)
        yield from _along_fourth_axis(hu.transpose(tuple(axes)), np.diag([-1.0, -1, 1, 1]) @ affine)

    yield from _each(folder, read)


def nibabel_image(folder: Path) -> Iterator[Volume]:
    import nibabel

    def read(path: Path) -> Iterator[Volume]:
        image = nibabel.load(path)
        yield from _along_fourth_axis(image.get_fdata(), image.affine)

    yield from _each(folder, read)


def monai_nibabel(folder: Path) -> Iterator[Volume]:
    from monai.transforms import LoadImage

    def read(path: Path) -> Iterator[Volume]:
        image = LoadImage(reader="NibabelReader")(str(path))
        yield from _along_fourth_axis(image.numpy(), image.affine.numpy())

    yield from _each(folder, read)


def torchio_image(folder: Path) -> Iterator[Volume]:
    import torchio

    def read(path: Path) -> Iterator[Volume]:
        image = torchio.ScalarImage(path)
        yield from _along_fourth_axis(np.moveaxis(image.data.numpy(), 0, 3), image.affine)

    yield from _each(folder, read)


NIFTI_PEERS: dict[str, Callable[[Path], Iterator[Volume]]] = {
    "SimpleITK ReadImage": simpleitk_image,
    "nibabel": nibabel_image,
    "MONAI NibabelReader": monai_nibabel,
    "TorchIO ScalarImage": torchio_image,
}
PEERS: dict[str, Callable[[Path], Iterator[Volume]]] = {
    "SimpleITK series reader": simpleitk,
    "highdicom": highdicom,
    "dicom2nifti": dicom2nifti,
    "MONAI ITKReader": monai_itk,
    "MONAI PydicomReader": monai_pydicom,
    "TorchIO": torchio,
}
NIFTI_AXES = ("dicom2nifti", "MONAI ITKReader", "MONAI PydicomReader", "TorchIO", *NIFTI_PEERS)
VERSIONS = {
    "SimpleITK series reader": "SimpleITK", "highdicom": "highdicom", "dicom2nifti": "dicom2nifti",
    "MONAI ITKReader": "monai", "MONAI PydicomReader": "monai", "TorchIO": "torchio",
    "SimpleITK ReadImage": "SimpleITK", "nibabel": "nibabel", "MONAI NibabelReader": "monai",
    "TorchIO ScalarImage": "torchio",
}  # fmt: skip


@contextlib.contextmanager
def said() -> Iterator[set[str]]:
    """Collect what is said meanwhile as Python warnings, log messages or text on standard error (as ITK's), by kind."""
    messages: set[str] = set()
    with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        screen = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield messages
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
            file.seek(0)
            lines = [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
            lines += [line for line in file.read().decode(errors="replace").splitlines() if "warning" in line.lower()]
            # Numbers and addresses in a message tell occasions apart, not kinds.
            messages.update(re.sub(r"(0x)?[0-9a-f]*[0-9][0-9a-f]*", "#", line)[:200] for line in lines)


def main(peer: str, cases: Path, out: Path) -> None:
    from importlib.metadata import version

    out.mkdir(parents=True, exist_ok=True)
    (out / "version.txt").write_text(version(VERSIONS[peer]))
    for folder in sorted(cases.iterdir()):
        target, failure = out / f"{folder.name}.npz", out / f"{folder.name}.json"
        if target.exists() or failure.exists():
            continue
        failure.write_text(json.dumps("the process died"))  # stands if it does
        with said() as messages:
            try:
                volumes = list((PEERS | NIFTI_PEERS)[peer](folder))
                error = None
            except Exception as raised:
                volumes, error = [], f"{type(raised).__name__}: {raised}"[:300]
        if error is None:
            arrays = {f"hu{n}": hu for n, (hu, _) in enumerate(volumes)}
            arrays |= {f"affine{n}": affine for n, (_, affine) in enumerate(volumes)}
            np.savez(target, said=np.array(sorted(messages), dtype=str), **arrays)
            failure.unlink()
        else:
            failure.write_text(json.dumps(error))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
