"""The data set gives what the reader gives, in every process, and chooses rows and patients."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from support.pages import snippets
from support.stores import add_volume, make_store, synthetic_hu
from torch.utils.data import DataLoader

import maesil
from maesil.errors import StoreError, UsageError
from maesil.store.index import write_index
from maesil.store.reader import SuperpatchReader

PAGE = snippets("how-to/dataset.md")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three patients; one with a finer spacing, of which half is no scan; and a split."""
    folder = tmp_path_factory.mktemp("dataset")
    store = make_store(folder / "store.zarr", [(40, 48, 40), (36, 64, 32)])
    hu = synthetic_hu((32, 32, 64), 9)
    valid = np.ones(hu.shape, bool)
    valid[:, :, 32:] = False
    add_volume(store, hu, name="fine", group="fine", spacing=(1.0, 1.0, 1.0), valid=valid)
    write_index(store)
    others = sorted(volume.group for volume in store.volumes() if volume.group != "fine")
    (folder / "run").mkdir()
    (folder / "run" / "split.json").write_text(json.dumps({"train": others, "validation": ["fine"], "test": []}))
    return folder, store


def test_every_superpatch_is_there_once_as_the_reader_reads_it(world):
    folder, store = world
    dataset, reader = maesil.SuperpatchDataset(folder / "store.zarr"), SuperpatchReader(store)
    places = {(item["volume_id"], tuple(item["index"].tolist())) for item in dataset}
    assert len(places) == len(dataset) == sum(len(volume.superpatches) for volume in store.volumes())
    for item in dataset:
        z, y, x = item["index"].tolist()
        expected = reader.read_superpatch(item["volume_id"], (z, y, x))
        inside = (item["valid"].numpy() > 0).repeat(8, 0).repeat(8, 1).repeat(8, 2)
        assert np.array_equal(item["hu"].numpy()[inside], expected[inside])
        assert (item["hu"].numpy()[~inside] == -1024).all()
        body = reader.read_map_region(item["volume_id"], "body", (32 * z, 32 * y, 32 * x), (32, 32, 32))
        assert np.array_equal(item["body"], body)
        volume = reader.volumes[item["volume_id"]]
        assert item["group"] == volume.group and item["spacing"].tolist() == list(volume.spacing)


@pytest.mark.parametrize("where, keeps", [
    ("body > 0.3 and spacing_z <= 1.5", lambda row: row["body"] > 0.3 and row["spacing_z"] <= 1.5),
    ("iz == 0", lambda row: row["iz"] == 0),
    ("group != 'fine'", lambda row: row["group"] != "fine"),
    (pc.field("air") < 0.5, lambda row: row["air"] < 0.5),
    (None, lambda row: True),
])  # fmt: skip
def test_rows_are_chosen_by_the_columns_of_the_index(world, where, keeps):
    import pyarrow.parquet as pq

    folder, store = world
    rows = pq.read_table(store.path / "index" / "superpatches.parquet").to_pylist()
    expected = [(row["volume_id"], [row["iz"], row["iy"], row["ix"]]) for row in rows if keeps(row)]
    assert len(expected) > 0 and (where is None or len(expected) < len(rows))
    dataset = maesil.SuperpatchDataset(folder / "store.zarr", where=where)
    assert [(item["volume_id"], item["index"].tolist()) for item in dataset] == expected


def test_a_split_keeps_the_patients_of_its_part(world):
    folder, _ = world
    split = folder / "run" / "split.json"
    groups = {part: {item["group"] for item in maesil.SuperpatchDataset(folder / "store.zarr", split=(split, part))}
              for part in ("train", "validation", "test")}  # fmt: skip
    assert groups["validation"] == {"fine"} and len(groups["train"]) == 2 and not groups["test"]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same_under_fork_and_spawn(world, start):
    folder, _ = world
    dataset = maesil.SuperpatchDataset(folder / "store.zarr")
    here = list(DataLoader(dataset, batch_size=3))  # opens a reader in this process, which no worker may use
    there = list(DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context=start))
    assert len(here) == len(there) > 1
    for one, other in zip(here, there, strict=True):
        assert one["volume_id"] == other["volume_id"] and torch.equal(one["hu"], other["hu"])


def test_it_pickles_without_its_reader(world):
    folder, _ = world
    dataset = maesil.SuperpatchDataset(str(folder / "store.zarr"), transform=_sum)
    dataset[0]
    data = pickle.dumps(dataset)
    assert len(data) < 5000
    assert pickle.loads(data)[0] == dataset[0]


def _sum(item):
    return int(item["hu"].sum())


def test_what_cannot_be_done_is_said(world, tmp_path):
    folder, _ = world
    path = folder / "store.zarr"
    for where in ("bodyy > 0.3", "body >", "body > much", "body ~ 3", "group > 3", ""):
        with pytest.raises(UsageError, match="where: "):
            maesil.SuperpatchDataset(path, where=where)
    with pytest.raises(UsageError, match="expected a filter as text"):
        maesil.SuperpatchDataset(path, where=3)
    with pytest.raises(UsageError, match="expected a file and one of its parts"):
        maesil.SuperpatchDataset(path, split=str(folder / "run" / "split.json"))
    with pytest.raises(UsageError, match="a part 'tests'"):
        maesil.SuperpatchDataset(path, split=(folder / "run" / "split.json", "tests"))
    with pytest.raises(UsageError, match="expected a split file"):
        maesil.SuperpatchDataset(path, split=(tmp_path / "none.json", "train"))
    with pytest.raises(StoreError, match="expected a store"):
        maesil.SuperpatchDataset(tmp_path / "none")
    with pytest.raises(IndexError):
        maesil.SuperpatchDataset(path)[10_000]


def test_a_store_that_changed_is_noticed(tmp_path):
    store = make_store(tmp_path / "s", [(32, 32, 32)])
    dataset = maesil.SuperpatchDataset(tmp_path / "s")
    add_volume(store, synthetic_hu((32, 32, 32), 4), name="later")
    with pytest.raises(StoreError, match="store changed"):
        dataset[0]
    with pytest.raises(StoreError, match="maesil store index"):
        maesil.SuperpatchDataset(tmp_path / "s")
    write_index(store)
    assert len(maesil.SuperpatchDataset(tmp_path / "s")) == 2


@pytest.mark.parametrize("section", ["Plain PyTorch", "MONAI"])
def test_the_examples_of_the_page_run(world, monkeypatch, section):
    folder, _ = world
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(PAGE[section], names)
    assert torch.isfinite(names["loss"])


def test_a_relative_path_outlives_a_change_of_folder(world, tmp_path, monkeypatch):
    folder, _ = world
    (name,) = {path.parent.name for path in folder.glob("*/zarr.json")}
    monkeypatch.chdir(folder)
    dataset = maesil.SuperpatchDataset(name)
    expected = dataset[0]["hu"]
    monkeypatch.chdir(tmp_path)
    again = maesil.SuperpatchDataset(f"file://{folder / name}")
    for late in (dataset, pickle.loads(pickle.dumps(dataset)), again):
        assert torch.equal(late[0]["hu"], expected)
