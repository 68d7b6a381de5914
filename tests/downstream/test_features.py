"""One embedding a superpatch: the weighted mean of tokens, written to a table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.ct_phantom import base_affine
from support.objects import upload
from support.runs import SMALL, save_run
from support.sources import phantom_hu
from support.stores import add_volume, make_store, synthetic_hu
from typer.testing import CliRunner

import maesil
from maesil.cache.provenance import record_uses, use_of
from maesil.cli import app
from maesil.data.split import Split
from maesil.downstream.encoder import Encoder
from maesil.downstream.export import export_encoder
from maesil.downstream.features import open_encoder, spacing_of_training, write_features
from maesil.errors import CheckpointError, NoInputError, ScanRefused, UsageError
from maesil.ingest.run import IngestOptions, ingest
from maesil.store.nifti import write_nifti
from maesil.store.reader import SuperpatchReader
from maesil.store.recipe import Recipe
from maesil.store.store import Store
from maesil.store.urls import ObjectUrl
from maesil.synthetic.dicom import SeriesIdentity, write_dicom_series

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of 64^3 superpatches, read by crops of 32^3: one patient, and one half of whom is no scan and no body."""
    folder = tmp_path_factory.mktemp("features")
    store = make_store(folder / "s", [(72, 64, 64)], superpatch=64)
    hu = synthetic_hu((64, 64, 128), 3)
    valid, body = np.zeros(hu.shape, bool), np.zeros(hu.shape, bool)
    valid[:, :, :40] = True
    body[8:24, 16:40, 4:30] = True
    add_volume(store, hu, name="half", group="half", valid=valid, body=body)
    run = save_run(folder / "run", Split((), ()))
    written = write_features(run, store.path, folder / "f.parquet", device="cpu")
    assert (written.rows, written.scans, written.refused) == (4, 2, {})
    return folder, store, pq.read_table(folder / "f.parquet")


def test_rows_are_the_superpatches_of_the_store(world):
    _, store, table = world
    found = [
        (row["volume_id"], row["group"], (row["iz"], row["iy"], row["ix"]), row["body"]) for row in table.to_pylist()
    ]
    expected = [(v.volume_id, v.group, p.index, p.body) for v in store.volumes() for p in v.superpatches]
    assert found == expected
    assert table.schema.metadata[b"maesil.store_fingerprint"].decode() == store.fingerprint


def test_an_embedding_is_the_mean_of_the_tokens_by_their_share_of_body(world):
    folder, store, table = world
    encoder, reader = open_encoder(folder / "run"), SuperpatchReader(store)
    for row in table.to_pylist():
        if row["weighted_by"] == "nothing":
            assert row["embedding"] is None and row["valid"] == 0
            continue
        total, weight = np.zeros(SMALL.width), 0.0
        for crop in np.ndindex(2, 2, 2):
            start = tuple(64 * i + 32 * c for i, c in zip((row["iz"], row["iy"], row["ix"]), crop, strict=True))
            hu = reader.read_region(row["volume_id"], start, (32, 32, 32))
            outside = reader.read_map_region(row["volume_id"], "valid", start, (32, 32, 32)) == 0
            hu[outside.repeat(8, 0).repeat(8, 1).repeat(8, 2)] = -1024
            share = reader.read_map_region(row["volume_id"], row["weighted_by"], start, (32, 32, 32)).ravel() / 255
            with torch.no_grad():
                tokens = encoder.forward_features(torch.from_numpy(hu)[None])[0].double().numpy()
            total, weight = total + share @ tokens, weight + share.sum()
        np.testing.assert_allclose(row["embedding"], total / weight, rtol=1e-4, atol=1e-5)


def test_weights_are_body_then_valid_then_nothing(world):
    _, _, table = world
    half = [row["weighted_by"] for row in table.to_pylist() if row["group"] == "half"]
    assert half == ["body", "nothing"]
    # What lies below the ellipsoid of the other patient is 8 layers of air and noise.
    assert {row["weighted_by"] for row in table.to_pylist()} <= {"body", "valid", "nothing"}


def test_an_exported_encoder_gives_the_same(world, tmp_path):
    folder, store, table = world
    export_encoder(folder / "run", tmp_path / "encoder")
    write_features(tmp_path / "encoder", store.path, tmp_path / "f.parquet", device="cpu")
    assert pq.read_table(tmp_path / "f.parquet").equals(table)


def test_what_does_not_fit_is_refused(world, tmp_path):
    folder, store, _ = world
    with pytest.raises(CheckpointError, match="expected a run folder"):
        write_features(tmp_path / "none", store.path, tmp_path / "f.parquet")
    with pytest.raises(NoInputError, match="no volumes"):
        write_features(folder / "run", make_store(tmp_path / "empty", []).path, tmp_path / "f.parquet")
    odd = make_store(tmp_path / "odd", [(24, 24, 24)], superpatch=24)
    with pytest.raises(UsageError, match=r"model\.crop"):
        write_features(folder / "run", odd.path, tmp_path / "f.parquet")
    assert not (tmp_path / "f.parquet").exists()


def test_what_is_cut_off_leaves_the_table_that_was_there(world, tmp_path, monkeypatch):
    folder, store, _ = world
    (tmp_path / "f.parquet").write_bytes(b"of before")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("maesil.downstream.features.embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_features(folder / "run", store.path, tmp_path / "f.parquet", device="cpu")
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("f.parquet", b"of before")]


def rows_of(path):
    return pq.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two scans and a localizer in folders, the store made of them, and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("scans")
    for number, name in enumerate(("a", "b")):
        who = SeriesIdentity(patient=name, study=name, description=name)
        write_dicom_series(folder / "scans" / name, phantom_hu(5.0 * number), base_affine(), who, seed=number)
    write_nifti(folder / "scans" / "no_hu.nii.gz", np.full((40, 40, 40), 7, np.int16), base_affine())
    options = IngestOptions(workers=0, key_file=folder / "key", cache_folder=folder / "cache")
    ingest([folder / "scans"], folder / "s", Recipe(spacing=(2.0, 2.0, 2.0), superpatch=32), options)
    run = save_run(folder / "run", Split((), ()))
    record_uses(run, [use_of(Store.open(folder / "s"), None)])
    return folder


@pytest.mark.parametrize("per", ["scan", "superpatch", "token"])
def test_scans_in_a_folder_give_what_a_store_of_them_gives(scans, tmp_path, per):
    of_store = write_features(scans / "run", scans / "s", tmp_path / "s.parquet", per=per, device="cpu")
    of_files = write_features(scans / "run", scans / "scans", tmp_path / "f.parquet", per=per, device="cpu")
    assert (of_store.scans, of_files.scans) == (2, 2)
    assert list(of_files.refused.values()) == ["constant"] and "no_hu" in next(iter(of_files.refused))

    def content(path):
        return sorted(([row[k] for k in row if k not in NAMES] for row in rows_of(path)), key=str)

    if per == "superpatch":  # those of the store are 32 voxels wide, those of scans as wide as a store's by default
        found = rows_of(tmp_path / "f.parquet")
        assert [(row["iz"], row["iy"], row["ix"], row["weighted_by"]) for row in found] == [(0, 0, 0, "body")] * 2
        assert of_store.rows > 2
    else:
        assert content(tmp_path / "s.parquet") == content(tmp_path / "f.parquet")
    assert {row["volume"] for row in rows_of(tmp_path / "f.parquet")} <= {1, 2, 3}
    if per == "token":
        assert {row["valid"] > 0 for row in rows_of(tmp_path / "f.parquet")} == {True}


def test_scans_in_a_bucket_give_what_they_give_in_a_folder(scans, tmp_path, bucket):
    upload(scans / "scans", bucket, "scans")
    url = ObjectUrl("s3", bucket, "scans")
    there = write_features(scans / "run", url, tmp_path / "there.parquet", per="scan", device="cpu")
    write_features(scans / "run", scans / "scans", tmp_path / "here.parquet", per="scan", device="cpu")
    assert list(there.refused) == [f"s3://{bucket}/scans/no_hu.nii.gz"]
    found = sorted(rows_of(tmp_path / "there.parquet"), key=lambda row: row["source"])
    expected = sorted(rows_of(tmp_path / "here.parquet"), key=lambda row: row["source"])
    assert [row["source"] for row in found] == [f"s3://{bucket}/scans/{name}" for name in ("a", "b")]
    assert [row["embedding"] for row in found] == [row["embedding"] for row in expected]
    with pytest.raises(NoInputError, match="expected objects with CT"):
        write_features(scans / "run", ObjectUrl("s3", bucket, "nothing"), tmp_path / "no.parquet", device="cpu")


NAMES = ("volume_id", "group", "source", "volume", "series")


def test_a_row_of_a_scan_is_its_vector(scans, tmp_path):
    write_features(scans / "run", scans / "scans", tmp_path / "f.parquet", per="scan", device="cpu")
    encoder = Encoder(open_encoder(scans / "run"), spacing_of_training(scans / "run"))
    assert encoder.preprocess.spacing == (2.0, 2.0, 2.0)
    for row in rows_of(tmp_path / "f.parquet"):
        embedding = encoder.embed(maesil.read_ct(row["source"], encoder.preprocess.spacing))
        np.testing.assert_allclose(row["embedding"], embedding.vector, rtol=1e-6)


def test_a_command_goes_on_where_it_was_interrupted(scans, tmp_path, monkeypatch):
    import maesil.downstream.features as module

    whole, seen = tmp_path / "whole.parquet", []
    write_features(scans / "run", scans / "scans", whole, per="scan", device="cpu")
    true = module.embed_scan

    def until_the_second(encoder, image):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(image.shape)
        return true(encoder, image)

    out = tmp_path / "f.parquet"
    monkeypatch.setattr(module, "embed_scan", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_features(scans / "run", scans / "scans", out, per="scan", device="cpu")
    assert not out.exists() and len(list((tmp_path / "f.parquet.parts").iterdir())) == 1
    monkeypatch.setattr(module, "embed_scan", lambda *given: seen.append("again") or true(*given))
    write_features(scans / "run", scans / "scans", out, per="scan", device="cpu")
    assert seen[1:] == ["again"] and rows_of(out) == rows_of(whole)
    assert not (tmp_path / "f.parquet.parts").exists()


def test_rows_of_another_kind_or_encoder_are_made_anew(scans, tmp_path, monkeypatch):
    import maesil.downstream.features as module

    def fails(*_):
        raise KeyboardInterrupt

    out = tmp_path / "f.parquet"
    with monkeypatch.context() as patched:
        patched.setattr(module._Table, "_joined", fails)
        with pytest.raises(KeyboardInterrupt):
            write_features(scans / "run", scans / "scans", out, per="scan", device="cpu")
    parts = set((tmp_path / "f.parquet.parts").iterdir())
    assert len(parts) == 2
    other = save_run(tmp_path / "other", Split((), ()), replace(SMALL, depth=2))
    seen = []
    true = module.embed_scan
    monkeypatch.setattr(module, "embed_scan", lambda *given: seen.append(1) or true(*given))
    write_features(other, scans / "scans", out, per="scan", device="cpu")
    assert len(seen) == 2


def test_the_command_says_what_was_refused(scans, tmp_path):
    told = CliRunner().invoke(
        app, ["features", str(scans / "run"), str(scans / "scans"), "--per", "scan", "--device", "cpu", "--out",
              str(tmp_path / "f.parquet")],
    )  # fmt: skip
    assert told.exit_code == 1 and "2 scans of 2 scans" in told.stdout
    assert "no_hu.nii.gz: refused (constant), not in the table" in told.stderr
    with pytest.raises(UsageError, match="--per=voxel: expected one of scan, superpatch, token"):
        write_features(scans / "run", scans / "scans", tmp_path / "g.parquet", per="voxel")
    with pytest.raises(ScanRefused):
        write_features(scans / "run", scans / "scans" / "no_hu.nii.gz", tmp_path / "g.parquet", device="cpu")
