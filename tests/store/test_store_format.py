"""The format is public: archived stores of every version are read, by zarr-python alone too; images are OME-Zarr."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import jsonschema
import numpy as np
import ome_zarr_models.v05 as ome
import pyarrow.parquet as pq
import pytest
import zarr
from pydantic import ValidationError
from support.ome_reader import OmeImage

from maesil.errors import StoreError
from maesil.store.reader import SuperpatchReader
from maesil.store.store import FORMAT_VERSION, TABLE_VERSION, Store
from maesil.store.verify import verify

ARCHIVES = sorted((Path(__file__).parents[1] / "archive").glob("store-*.tar.gz"))
CODECS = ("fast", "compact", "raw")


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def archive(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    with tarfile.open(request.param) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module", params=CODECS)
def store(request, archive) -> Store:
    return Store.open(archive / f"{request.param}.zarr")


@pytest.fixture(scope="module")
def expected(archive, store) -> dict:
    hu = np.load(archive / "hu.npz")
    document = json.loads((archive / "expected.json").read_text())[store.path.stem]
    return document | {"hu": {volume_id: hu[kind] for volume_id, kind in document["volumes"].items()}}


def test_there_is_an_archive_of_every_version():
    assert [path.name for path in ARCHIVES] == [f"store-{n}.tar.gz" for n in range(1, FORMAT_VERSION + 1)]
    assert all(path.stat().st_size < 400_000 for path in ARCHIVES)


def test_an_archived_store_is_read_voxel_for_voxel(store, expected):
    reader = SuperpatchReader(store)
    assert set(reader.volumes) == set(expected["hu"])
    for volume_id, hu in expected["hu"].items():
        np.testing.assert_array_equal(reader.read_region(volume_id, (0, 0, 0), hu.shape), hu)
    assert store.recipe_hash == store.recipe.hash == expected["recipe_hash"]
    assert [record.code for record in store.quarantined()] == expected["refused"]
    verified = verify(store)
    assert (verified.volumes, verified.superpatches, verified.problems) == (2, expected["superpatches"], ())


def test_zarr_python_alone_reads_an_archived_store_alike(store, expected):
    root = zarr.open_group(store.path, mode="r")
    for volume_id, hu in expected["hu"].items():
        (attempt,) = root[f"volumes/{volume_id[:2]}/{volume_id}"].groups()
        np.testing.assert_array_equal(attempt[1]["0"][:], hu)
        for name in ("valid", "body"):
            assert attempt[1][name].shape == tuple(-(-n // 8) for n in hu.shape)


def test_the_archived_tables_lead_to_the_bytes_of_every_superpatch(store, expected):
    table = pq.read_table(io.BytesIO(store.storage.read("index/superpatches.parquet"))).to_pylist()
    rows = {(row["path"], row["offset"], row["length"], row["crc32c"]) for row in table}
    patches = {(p.path, p.offset, p.length, p.crc32c) for v in store.volumes() for p in v.superpatches}
    assert rows == patches and len(rows) == expected["superpatches"]


def test_every_image_is_valid_ome_zarr(store):
    for volume in store.volumes():
        if store.version > 1:
            first = OmeImage(store.path / volume.prefix).lps((0, 0, 0))
            np.testing.assert_allclose(first, volume.affine[:3, 3], rtol=0, atol=1e-9)
            continue
        image = ome.Image.from_zarr(zarr.open_group(store.path / volume.prefix, mode="r"))
        (scale,) = image.ome_attributes.multiscales
        assert [axis.name for axis in scale.axes] == ["z", "y", "x"]
        assert {axis.unit for axis in scale.axes} == {"millimeter"}
        spacing, origin = scale.datasets[0].coordinateTransformations
        assert tuple(spacing.scale) == volume.spacing
        assert tuple(origin.translation) == tuple(volume.affine_lps[row][3] for row in (2, 1, 0))


def test_the_validators_would_have_found_a_fault(archive, tmp_path):
    store = Store.open(archive / "raw.zarr")
    document = json.loads((store.path / store.volumes()[0].prefix / "zarr.json").read_text())
    (scales,) = document["attributes"]["ome"]["multiscales"]
    del scales["axes" if store.version == 1 else "coordinateSystems"]
    (tmp_path / "zarr.json").write_text(json.dumps(document))
    if store.version == 1:
        with pytest.raises(ValidationError, match="axes"):
            ome.Image.from_zarr(zarr.open_group(tmp_path, mode="r"))
    else:
        with pytest.raises(jsonschema.ValidationError, match="coordinateSystems"):
            OmeImage(tmp_path)


@pytest.mark.parametrize(("version", "advice"), [(TABLE_VERSION + 1, "newer maesil"), (0, "ingest again"), ("2", "")])
def test_another_version_is_refused_in_one_line(tmp_path, version, advice):
    maesil = {"format": "maesil-superpatch-store", "version": version, "recipe_hash": "", "key_fingerprint": ""}
    (tmp_path / "zarr.json").write_text(json.dumps({"attributes": {"maesil": maesil}}))
    with pytest.raises(StoreError, match=rf"version {version}.*{advice}") as caught:
        Store.open(tmp_path)
    assert "\n" not in str(caught.value)
