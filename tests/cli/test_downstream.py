"""The commands that use what was trained, as a user types them."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.labelled import labelled_store
from support.proofs import TINY, make_world
from support.runs import save_run
from typer.testing import CliRunner

from maesil.cli import app
from maesil.data.split import Split, write_split
from maesil.documents import read_json
from maesil.store.nifti import write_nifti

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli_use")
    store, labels, volumes = labelled_store(folder, 2)
    return folder, store.path, labels, volumes, save_run(folder / "run", Split((), ()))


def maesil(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_export_features_and_what_comes_next(world, tmp_path):
    _, store, _, _, run = world
    code, out, _ = maesil("export", run, "--out", tmp_path / "encoder", "--licence", "CC BY 4.0")
    assert code == 0 and "maesil.load_encoder" in out
    code, out, _ = maesil("features", tmp_path / "encoder", store, "--out", tmp_path / "f.parquet", "--device", "cpu")
    assert code == 0 and re.search(r"f\.parquet: \d+ superpatches", out)
    code, _, error = maesil("export", tmp_path, "--out", tmp_path / "x")
    assert code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1


def test_probe_as_a_table_and_as_json(world, tmp_path):
    _, store, labels, _, run = world
    given = ("probe", run, store, "--labels", labels, "--patches", "100", "--device", "cpu", "--out", tmp_path)
    code, out, _ = maesil(*given, "--classes", "lung")
    assert code == 0 and "untrained" in out and "lung" in out and "liver" not in out
    code, out, _ = maesil(*given, "--json")
    assert code == 0 and json.loads(out) == read_json(tmp_path / "probe.json")
    code, _, error = maesil(*given[:3], "--labels", tmp_path / "none")
    assert code == 3 and "expected a folder of labels" in error


def test_finetune(world, tmp_path):
    _, store, labels, _, run = world
    given = (
        "finetune",
        run,
        store,
        "--labels",
        labels,
        "--out",
        tmp_path,
        "--steps",
        "1",
        "--batch",
        "1",
        "--seeds",
        "1",
    )
    code, out, _ = maesil(*given, "--device", "cpu", "--classes", "lung", "--classes", "heart")
    assert code == 0 and "pretrained" in out and "scratch" in out and "1 patient learnt from, 1 other scored" in out
    assert set(json.loads((tmp_path / "finetune.json").read_text())["mean"]["scratch"]) == {"lung", "heart", "mean"}


def test_prove_refuses_in_one_line_before_anything_is_scored(tmp_path):
    store, labels, _, run, split = make_world(tmp_path, (28, 34, 44))
    given = ("prove", run, store.path, "--labels", labels, "--out", tmp_path / "proof", "--split", split)
    trained = Split(("patient-3",), ("patient-0",), ("patient-1",))
    write_split(tmp_path / "trained.json", trained, [store.fingerprint])
    for words, code, told in (
        (("--budget", "huge"), 2, "budget"),
        (("--part", "train"), 2, "part"),
        (("--adapter", "nowhere"), 2, "module:function"),
        (("--labels", tmp_path / "none"), 3, "expected a folder of labels"),
        (("--split", tmp_path / "trained.json"), 2, "--include-trained"),
    ):
        found, _, error = maesil(*given, *words, "--device", "cpu")
        assert (found, len(error.splitlines())) == (code, 1) and told in error, error
        assert not (tmp_path / "proof").exists()


@pytest.mark.slow
def test_prove_as_tables_as_json_and_as_a_page(tmp_path, monkeypatch):
    store, labels, _, run, split = make_world(tmp_path)
    monkeypatch.setattr("maesil.downstream.prove.ProofBudget.load", lambda name: TINY)
    given = ("prove", run, store.path, "--labels", labels, "--out", tmp_path / "proof", "--split", split)
    code, out, _ = maesil(*given, "--device", "cpu", "--classes", "lung")
    assert code == 0 and "Frozen encoders" in out and "comparisons: helps in 0, harms in 0" in out
    assert (
        out.splitlines()[-1] == f"page: {tmp_path / 'proof' / 'index.html'}"
        and (tmp_path / "proof/index.html").exists()
    )
    code, out, _ = maesil(*given, "--device", "cpu", "--classes", "lung", "--json")
    assert code == 0 and json.loads(out) == read_json(tmp_path / "proof" / "prove.json")


def test_link_labels_leads_from_a_report_to_a_folder_that_probe_takes(world, tmp_path):
    _, store, _, volumes, run = world
    paths = [tmp_path / "img" / f"img{number}.nii.gz" for number in range(len(volumes))]
    for number, volume in enumerate(volumes):
        above = np.zeros(volume.shape, np.int16)
        above[volume.shape[0] // 2 :] = 1
        write_nifti(tmp_path / "label" / f"label{number}.nii.gz", above, volume.affine)
    rows = {"path": map(str, paths), "status": ["used"] * 2, "volume_id": [volume.volume_id for volume in volumes]}
    (tmp_path / "report").mkdir()
    pq.write_table(
        pa.table({name: list(values) for name, values in rows.items()}), tmp_path / "report" / "files.parquet"
    )
    out = tmp_path / "linked"
    code, told, _ = maesil(
        "link-labels", tmp_path / "report", "--image", r"img/img(\d)", "--label", r"label/label\1", "--out", out
    )
    assert code == 0 and "labels of 2 volumes, 0 volumes without" in told
    code, told, _ = maesil(
        "probe", run, store, "--labels", out, "--patches", "50", "--device", "cpu", "--out", tmp_path
    )
    assert code == 0 and "2 folds by patient" in told


def test_where_nothing_can_be_written_is_one_line_before_any_work(world, tmp_path):
    _, store, labels, _, run = world
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"path": ["a"], "status": ["used"], "volume_id": ["v"]}), tmp_path / "files.parquet")
    use = (run, store, "--device", "cpu")
    for given in (
        ("features", *use, "--out", tmp_path / "folder"),
        ("features", *use, "--out", tmp_path / "file" / "f.parquet"),
        ("probe", *use, "--labels", labels, "--out", tmp_path / "file"),
        ("finetune", *use, "--labels", labels, "--out", tmp_path / "file"),
        ("evaluate", *use, "--out", tmp_path / "e", "--json", tmp_path / "folder"),
        ("evaluate", *use, "--out", tmp_path / "file"),
        ("link-labels", tmp_path, "--image", "a", "--label", "b", "--out", tmp_path / "file"),
        ("store", "split", store, "--shares", "0.5,0.5,0", "--out", tmp_path / "folder"),
        ("ingest", labels, "--out", tmp_path / "s", "--report", tmp_path / "file"),
    ):
        code, _, error = maesil(*given)
        assert (code, len(error.splitlines())) == (2, 1) and "expected" in error and "name another" in error, given
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "folder", "files.parquet", "e"}


@pytest.mark.parametrize("option, value", [
    ("--lr", "nan"), ("--lr", "0"), ("--lr", "-1"), ("--lr", "inf"),
    ("--test", "0"), ("--test", "1"), ("--test", "nan"),
])  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(world, tmp_path, option, value):
    _, store, labels, _, run = world
    code, _, error = maesil("finetune", run, store, "--labels", labels, "--out", tmp_path / "o", f"{option}={value}")
    assert code == 2 and f"{option}: expected" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "o").exists()
