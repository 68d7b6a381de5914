"""One embedding a superpatch: the weighted mean of tokens, written to a table."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.runs import SMALL, save_run
from support.stores import add_volume, make_store, synthetic_hu

from maesil.data.split import Split
from maesil.downstream.export import export_encoder
from maesil.downstream.features import open_encoder, write_features
from maesil.errors import CheckpointError, NoInputError, UsageError
from maesil.store.reader import SuperpatchReader

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
    rows = write_features(run, store.path, folder / "f.parquet", device="cpu")
    assert rows == 4
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
