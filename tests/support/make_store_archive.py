"""Makes ``tests/archive/store-N.tar.gz``: small stores of format version N that every later version must read.

Run once a format version, and never again for one that was published: ``python tests/support/make_store_archive.py``.
The voxels it expects are those of the sources, which it wrote itself; no reader of maesil has touched them.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from support.ct_phantom import SHAPE, SPACING, base_affine, sample  # noqa: E402

from maesil.ingest.options import IngestOptions  # noqa: E402
from maesil.ingest.run import ingest  # noqa: E402
from maesil.store.nifti import write_nifti  # noqa: E402
from maesil.store.recipe import CODECS, Recipe  # noqa: E402
from maesil.store.store import FORMAT_VERSION, Store  # noqa: E402
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series  # noqa: E402

GRIDS = {"dicom": (18, 33, 21), "nifti": (20, 37, 70)}
"""Odd shapes of the two volumes; the second has smaller levels, and more superpatches of 8^3 than one shard holds."""
SUPERPATCH = {"fast": 8, "compact": 16, "raw": 16}
PATIENT = SeriesIdentity(patient="ARCHIVE-1", study="archive", description="archive")


def grid(shape: tuple[int, int, int]) -> np.ndarray:
    """The affine that spreads a shape over the phantom."""
    z, y, x = (mm * n / m for mm, n, m in zip(SPACING, SHAPE, shape, strict=True))
    return base_affine((round(z, 3), round(y, 3), round(x, 3)))


def write_sources(folder: Path) -> dict[str, np.ndarray]:
    """A DICOM series, a NIfTI file, and one that was cut and must be refused; return what is to be found in them."""
    hu = {kind: np.rint(sample(grid(shape), shape)).astype(np.int16) for kind, shape in GRIDS.items()}
    write_dicom_series(folder / "dicom", hu["dicom"], grid(GRIDS["dicom"]), PATIENT, seed=0)
    write_nifti(folder / "whole.nii.gz", hu["nifti"], grid(GRIDS["nifti"]))
    (folder / "cut.nii.gz").write_bytes((folder / "whole.nii.gz").read_bytes()[:5000])
    return hu


def make(folder: Path) -> None:
    """Ingest the sources once a codec, without resampling, and note what the stores must give back."""
    hu = write_sources(folder / "sources")
    (folder / "key").write_text("0123456789abcdef" * 4)
    expected = {}
    for codec in CODECS:
        recipe = Recipe(spacing=None, superpatch=SUPERPATCH[codec], codec=codec)
        options = IngestOptions(workers=0, key_file=folder / "key", cache_folder=folder / "cache")
        ingest([folder / "sources"], folder / "archive" / f"{codec}.zarr", recipe, options)
        store = Store.open(folder / "archive" / f"{codec}.zarr")
        expected[codec] = {
            "volumes": {volume.volume_id: volume.source["kind"] for volume in store.volumes()},
            "superpatches": sum(len(volume.superpatches) for volume in store.volumes()),
            "refused": [record.code for record in store.quarantined()],
            "recipe_hash": store.recipe_hash,
        }
    np.savez_compressed(folder / "archive" / "hu.npz", **hu)
    (folder / "archive" / "expected.json").write_text(json.dumps(expected, indent=1))


def pack(folder: Path, archive: Path) -> None:
    """Pack a folder so that equal content gives equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = tarfile.TarInfo(path.relative_to(folder).as_posix())
            info.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(info, file)
    archive.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))


if __name__ == "__main__":
    target = ROOT / "archive" / f"store-{FORMAT_VERSION}.tar.gz"
    with tempfile.TemporaryDirectory() as made:
        make(Path(made))
        pack(Path(made) / "archive", target)
    print(f"{target}: {target.stat().st_size / 1e3:.0f} kB")
