"""The whole experiment on a small real store with small models; then again, interrupted, and with what it refuses."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import tomllib
from importlib.resources import files
from itertools import combinations

import pytest
from rich.console import Console
from support.experiments import small_budget
from support.lanes import slow_but
from support.stores import add_volume, make_store, synthetic_hu

from maesil.config.schema import MODEL_KINDS, PAPER_KINDS, RunConfig
from maesil.data.crops import validation_crops
from maesil.data.sources import Sources
from maesil.documents import read_json
from maesil.errors import DamagedError, UsageError
from maesil.evaluation.experiment import TABLES, ExperimentBudget, run_paper_experiment
from maesil.evaluation.predict import model_predictors, psnr_of_crops
from maesil.evaluation.report import NAMES
from maesil.evaluation.scores import SCORES
from maesil.models.registry import _KINDS
from maesil.training.checkpoint import load_run
from maesil.training.log import METRICS, read_metrics

pytestmark = pytest.mark.usefixtures("one_thread", "plain_runs")

BUDGET = small_budget(PAPER_KINDS, steps=2, test=0.3)


def run(stores, out, **options):
    console = Console(file=io.StringIO(), width=200)
    given = {"device": "cpu", "console": console, **options}
    return run_paper_experiment(
        [store.path for store in stores], out, given.pop("budget", BUDGET), **given
    ), console.file.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four patients in two stores, and the first one's scan once more in the other store, under another name."""
    folder = tmp_path_factory.mktemp("experiment")
    one = make_store(folder / "s", [(40, 48, 40), (36, 40, 48)], superpatch=32)
    other = make_store(folder / "t", [(40, 40, 40), (33, 44, 50)], superpatch=32, seed=2)
    add_volume(other, synthetic_hu((40, 48, 40), 0), name="again", group="again")
    experiment, _ = run([one, other], folder / "out")
    return [one, other], folder / "out", experiment


def test_a_scan_under_two_names_is_one_patient_and_nobody_is_in_two_parts(world):
    stores, _, experiment = world
    split = experiment.split
    parts = [set(split.train), set(split.validation), set(split.test)]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == 5
    (twin,) = [v.group for v in stores[0].volumes() if v.shape == (40, 48, 40)]
    assert any({twin, "again"} <= part for part in parts)


def test_the_patients_set_aside_are_scored_and_no_others(tmp_path):
    store = make_store(tmp_path / "s", [(32, 40, 32), (36, 32, 32), (32, 32, 40), (40, 32, 32)], superpatch=32)
    experiment, _ = run([store], tmp_path / "out", models=["ae"])
    split = experiment.split
    parts = [set(split.train), set(split.validation), set(split.test)]
    assert all(parts) and not any(one & other for one, other in combinations(parts, 2))
    scored = [*(one.scored for one in experiment.runs), experiment.naive]
    assert len(scored) == 3
    assert all({row["group"] for row in rows} == parts[2] for rows in scored)


def test_rows_hold_both_tables_all_models_and_the_naive_baselines(world):
    _, out, _ = world
    document = json.loads((out / "results.json").read_text())
    found = {(row["table"], row["model"], row["region"]) for row in document["rows"]}
    expected = {(t, m, r) for t in TABLES for m in (*PAPER_KINDS, "maesil_tokens") for r in ("body", "whole")}
    assert found == expected | {("A", m, r) for m in ("mean", "interpolation") for r in ("body", "whole")}
    for row in document["rows"]:
        assert set(SCORES) <= set(row)
        assert (row["input"], row["mask"]) == {"A": ("masked", "dual"), "B": ("full", "none")}[row["table"]]
        assert (row["psnr_hidden"] is None) == (row["table"] == "B")
        assert isinstance(row["psnr_whole"], float) and row["volumes"] >= 1
    assert {row["group_by"] for row in document["rows_other"]} == {"hu_class", "column", "slice_thickness"}
    assert set(document["seconds"]) == {f"{t}_{m}" for t in TABLES for m in PAPER_KINDS}


def test_csv_markdown_and_page_hold_the_same_scores_and_the_page_is_self_contained(world):
    _, out, _ = world
    rows = json.loads((out / "results.json").read_text())["rows"]
    read = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert [float(one["mae_hu"]) for one in read] == pytest.approx([row["mae_hu"] for row in rows])
    tables, page = (out / "tables.md").read_text(), (out / "index.html").read_text()
    for row in rows:
        if row["region"] == "body" and row["table"] == "A":
            assert f"{row['psnr_hidden']:.2f}" in tables and f"{row['psnr_hidden']:.2f}" in page
    images = re.findall(r'src="([^"]+)"', page)
    assert len(images) == 3
    assert all(base64.b64decode(src.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG") for src in images)
    assert "http" not in page


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_the_same_seed_gives_the_same_table(world, tmp_path):
    stores, out, _ = world
    before = {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint.pt")}
    assert len(before) == 10
    first = json.loads((out / "results.json").read_text())["rows"]
    run(stores[::-1], out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint.pt")} == before
    # Anew, but for most of the models, which are taken over; one was cut off in the middle.
    other = tmp_path / "other"
    shutil.copytree(out, other)
    for name in ("A_vae", "B_maesil"):
        shutil.rmtree(other / "runs" / name)
    shutil.rmtree(other / "floors")
    (other / "runs" / "A_vqvae" / "trained").unlink()
    (other / "runs" / "A_vqvae" / "scores.json").unlink()
    run(stores, other)
    assert json.loads((other / "results.json").read_text())["rows"] == first


def test_the_curves_hold_the_naive_baselines_on_the_very_crops_of_the_curves(world):
    """A model scored the same way comes to the PSNR that its own training logged."""
    stores, out, experiment = world
    loaded = load_run(out / "runs" / "A_maesil")
    sources = Sources.open([store.path for store in stores], loaded.config.model)
    crops = validation_crops(sources, loaded.split.validation, loaded.config.model.crop, loaded.config.train)
    logged = read_metrics(out / "runs" / "A_maesil" / METRICS)[-1]["validation_psnr"]
    assert psnr_of_crops(model_predictors(loaded)[0], crops, loaded) == pytest.approx(logged, abs=0.02)
    assert experiment.naive_curves == read_json(out / "floors" / "crops.json")["psnr"]
    assert experiment.naive_curves["interpolation"] > experiment.naive_curves["mean"]


def test_a_frozen_split_is_taken_and_one_without_scored_patients_is_refused(world, tmp_path):
    stores, _, experiment = world
    path = tmp_path / "split.json"
    parts = experiment.split.train, experiment.split.test, experiment.split.validation  # the last two change places
    path.write_text(json.dumps(dict(zip(("train", "validation", "test"), parts, strict=True))))
    found, _ = run(stores, tmp_path / "out", split_file=path, models=["ae"])
    assert (found.split.train, found.split.validation, found.split.test) == parts
    path.write_text(json.dumps({"train": parts[0], "validation": parts[1]}))
    with pytest.raises(UsageError, match="patients for train, validation and test, found"):
        run(stores, tmp_path / "other", split_file=path)


def test_the_table_says_how_far_maesil_lies_above_each_row_and_how_sure_that_is(world):
    _, out, experiment = world
    _, table, _ = (out / "tables.md").read_text().split("\n## ")
    header, *lines = [line for line in table.splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in header.split("|")].index("MAESIL minus this (dB, 95 %)")
    cells = {line.split("|")[1].strip(): line.split("|")[column].strip() for line in lines}
    assert cells["MAESIL"] == "-"
    rows = {r["model"]: r for r in experiment.rows() if (r["table"], r["region"]) == ("A", "body")}
    found = experiment.difference(rows["ae"], "psnr_hidden")
    if found is not None:  # two patients or more were scored
        assert found.low <= found.mean <= found.high


@pytest.mark.parametrize("table", slow_but(TABLES, ("A",)))
def test_one_table_alone_holds_its_rows_of_both(world, tmp_path, table):
    stores, out, _ = world
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("AB".replace(table, "") + "_*", "floors"))
    found, _ = run(stores, tmp_path / "out", tables=[table])
    both = [row for row in read_json(out / "results.json")["rows"] if row["table"] == table]
    assert read_json(tmp_path / "out" / "results.json")["rows"] == both and found.tables == [table]
    assert (tmp_path / "out" / "index.html").read_text().count("<h2>") == 1
    with pytest.raises(UsageError, match="there are A, B"):
        run(stores, tmp_path / "none", tables=["C"])


def test_the_models_of_a_table_see_the_same_masks(world):
    _, out, _ = world
    import numpy as np

    hidden = [np.load(path)["hidden"] for path in sorted((out / "runs").glob("A_*/crop.npz"))]
    assert len(hidden) == 5 and all(np.array_equal(hidden[0], other) for other in hidden[1:])
    assert 0.7 < hidden[0].mean() < 0.8
    assert all(np.load(path)["hidden"].all() for path in (out / "runs").glob("B_*/crop.npz"))


def test_every_model_was_trained_on_the_training_patients_alone(world):
    _, out, experiment = world
    for folder in (out / "runs").iterdir():
        assert load_run(folder).split == experiment.split


def test_another_experiment_in_the_folder_and_too_few_patients_are_refused(world, tmp_path):
    stores, out, _ = world
    with pytest.raises(UsageError, match="another seed"):
        run(stores, out, seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="found other files"):
        run(stores, tmp_path / "full")
    two = make_store(tmp_path / "two", [(32, 32, 32), (32, 40, 32)], superpatch=32)
    with pytest.raises(UsageError, match="at least 3 patients"):
        run([two], tmp_path / "o")
    with pytest.raises(UsageError, match="give each scan once"):
        run([stores[0], stores[0]], tmp_path / "o")
    with pytest.raises(UsageError, match="did you mean maesil"):
        run(stores, tmp_path / "p", models=["maesill"])
    with pytest.raises(UsageError, match="torchvision's alexnet"):
        run(stores, tmp_path / "q", lpips_weights=tmp_path / "nowhere.pth")
    assert not (tmp_path / "q").exists()


KEPT = ["experiment.json", "runs/A_ae/scores.json", "floors/volumes.json", "floors/crops.json", "runs/A_ae/crop.npz"]


@pytest.mark.parametrize("name", slow_but(KEPT, ("experiment.json", "runs/A_ae/scores.json")))
def test_what_was_cut_short_or_altered_ends_in_one_line_and_is_not_made_over(world, tmp_path, name):
    stores, out, _ = world
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out" / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = [b"", whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(DamagedError, match="found it damaged") as error:
            run(stores, tmp_path / "out")
        assert error.value.exit_code == 4 and path.name in str(error.value) and "\n" not in str(error.value)
        assert path.read_bytes() == data


def test_every_kind_of_model_has_a_maker_and_a_name():
    assert set(_KINDS) == set(MODEL_KINDS) and set(PAPER_KINDS) < set(NAMES)


def test_every_budget_of_the_file_makes_configurations():
    names = tomllib.loads((files("maesil.evaluation") / "paper.toml").read_text("utf-8"))
    assert set(names) == {"tiny", "cpu-2h", "cpu-night", "h100-10min", "paper"}
    for name in names:
        for model in PAPER_KINDS:
            for table in TABLES:
                config = ExperimentBudget.load(name).config(model, table, 3, "cpu")
                assert isinstance(config, RunConfig)
                assert (config.model.kind, config.mask.kind, config.train.seed) == (model, TABLES[table], 3)
    with pytest.raises(UsageError, match="there are tiny"):
        ExperimentBudget.load("huge")
