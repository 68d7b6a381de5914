"""Exported volumes, read by other people's programs: HU and positions, whatever the scan's direction."""

from __future__ import annotations

import json
import zipfile
from itertools import product
from pathlib import Path

import ngff_zarr
import numpy as np
import pytest
import SimpleITK as sitk
from support.ct_phantom import base_affine, rotated
from support.ome_reader import OmeImage, in_order
from support.stores import add_volume, synthetic_hu
from typer.testing import CliRunner

from maesil.cli import app
from maesil.errors import StoreError, UsageError
from maesil.geometry import world_of
from maesil.store.export import export_nrrd, export_ome_zarr, export_zipped
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.store import Store

AFFINES = {
    "straight": base_affine(),
    "oblique": rotated(base_affine(), (9.0, -7.0, 12.0)),
    "steep": rotated(base_affine((5.0, 0.7, 0.7)), (38.0, 5.0, -20.0)),
}


@pytest.fixture(scope="module", params=AFFINES)
def exported(request, tmp_path_factory):
    """A store of one volume that lies like this, its HU, and a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    store = Store.create(folder / "s", Recipe(spacing=None, superpatch=16, codec="fast"), key_fingerprint="0" * 16)
    hu = synthetic_hu((30, 66, 70))
    add_volume(store, hu, affine=AFFINES[request.param])
    return SuperpatchReader(Store.open(folder / "s")), hu, folder


def corners(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return in_order(world_of(affine, np.array([*product(*((0, n - 1) for n in shape))])))


def only(reader: SuperpatchReader) -> str:
    (volume_id,) = reader.volumes
    return volume_id


def test_nrrd_is_read_by_itk_with_every_corner_in_its_place(exported):
    reader, hu, folder = exported
    image = sitk.ReadImage(str(export_nrrd(reader, only(reader), folder / "nrrd")))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), hu)
    index = [[int(n) for n in row] for row in product(*((0, n - 1) for n in image.GetSize()))]
    found = in_order(np.array([image.TransformIndexToPhysicalPoint(row) for row in index]))
    np.testing.assert_allclose(found, corners(reader.volumes[only(reader)].affine, hu.shape), rtol=0, atol=0.01)


@pytest.mark.parametrize("export", [export_ome_zarr, export_zipped])
def test_ome_zarr_is_read_by_ngff_zarr_with_every_corner_in_its_place(exported, export):
    reader, hu, folder = exported
    path = export(reader, only(reader), folder / export.__name__)
    image = OmeImage(path)
    np.testing.assert_array_equal(image.hu(), hu)
    np.testing.assert_allclose(
        image.corners(), corners(reader.volumes[only(reader)].affine, hu.shape), rtol=0, atol=0.01
    )
    assert len(image.read.images) > 1 and image.hu(1).any()


def test_the_zip_is_as_rfc_9_asks(exported):
    reader, _, folder = exported
    path = export_zipped(reader, only(reader), folder / "zip")
    with zipfile.ZipFile(path) as archive:
        names, kinds = archive.namelist(), {member.compress_type for member in archive.infolist()}
        assert archive.testzip() is None and json.loads(archive.comment)["ome"]["version"] == "0.6"
    assert names[0] == "zarr.json" and kinds == {zipfile.ZIP_STORED}
    documents = [name.endswith("zarr.json") for name in names]
    assert documents == sorted(documents, reverse=True)
    depths = [name.count("/") for name in names if name.endswith("zarr.json")]
    assert depths == sorted(depths)
    assert ngff_zarr.read_ozx_json_first(path) and ngff_zarr.read_ozx_version(path) == "0.6"
    assert not any(name.startswith(("valid", "body", "thumbnail")) for name in names)


def test_a_folder_that_is_there_is_not_touched(exported):
    reader, _, folder = exported
    export_ome_zarr(reader, only(reader), folder / "twice")
    with pytest.raises(UsageError, match="remove it"):
        export_ome_zarr(reader, only(reader), folder / "twice")
    assert [path.name for path in (folder / "twice").iterdir()] == [f"{only(reader)}.ome.zarr"]


@pytest.mark.parametrize("name", ["0/c/0/0/0", "1/c/0/0/0", "1/zarr.json"])
def test_damage_is_never_handed_on(exported, name):
    reader, _, folder = exported
    path = Path(str(reader.storage.root)) / reader.volumes[only(reader)].prefix / name
    data = path.read_bytes()
    try:
        path.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
        for export in (export_ome_zarr, export_zipped):
            with pytest.raises(StoreError):
                export(reader, only(reader), folder / "damaged")
        assert list((folder / "damaged").iterdir()) == []
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("arguments", [["--format", "dicom"], ["--zip"], ["--zip", "--format", "nrrd"]])
def test_what_cannot_be_is_said(exported, arguments):
    reader, _, folder = exported
    result = CliRunner().invoke(app, ["store", "export", str(reader.storage.root), "--out", str(folder), *arguments])
    assert result.exit_code == 2 and "expected" in result.output


def test_the_command_writes_each_form(exported):
    reader, _, folder = exported
    for arguments, suffix in (
        (["--format", "ome-zarr", "--zip"], ".ozx"),
        (["--format", "nrrd"], ".nrrd"),
        ([], ".nii.gz"),
    ):
        out = folder / f"by command{suffix}"
        result = CliRunner().invoke(app, ["store", "export", str(reader.storage.root), "--out", str(out), *arguments])
        assert result.exit_code == 0, result.output
        assert [path.name for path in out.iterdir()] == [f"{only(reader)}{suffix}"]
