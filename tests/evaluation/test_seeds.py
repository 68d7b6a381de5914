"""Several seeds: each is the experiment that it is alone, the tables hold their means, and the spread is of seeds."""

from __future__ import annotations

import io
import json
import math
import shutil

import numpy as np
import pytest
from rich.console import Console
from support.experiments import small_budget
from support.stores import make_store

from maesil.documents import read_json
from maesil.errors import UsageError
from maesil.evaluation.experiment import run_paper_experiment
from maesil.evaluation.scores import SCORES
from maesil.evaluation.seeds import mean_volume_rows, run_with_seeds

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

MODELS = ("maesil", "ae")
BUDGET = small_budget(MODELS, steps=3, test=0.4)


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    store = make_store(
        folder / "s", [(32, 40, 32), (36, 32, 32), (32, 32, 40), (40, 32, 32), (32, 36, 32)], superpatch=32
    )
    experiment = run_with_seeds(
        [store.path], folder / "out", BUDGET, (3, 4), device="cpu", models=MODELS, console=quiet()
    )
    return store, folder / "out", experiment


def test_a_seed_among_several_is_the_experiment_of_that_seed_alone(world, tmp_path):
    store, out, _ = world
    run_paper_experiment([store.path], tmp_path / "alone", BUDGET, seed=3, device="cpu", models=MODELS, console=quiet())
    first, alone = (read_json(folder / "results.json")["rows"] for folder in (out / "seed-3", tmp_path / "alone"))
    assert first == alone


def test_all_seeds_score_the_same_patients_but_train_other_weights(world):
    _, out, _ = world
    one, other = (read_json(out / f"seed-{seed}" / "experiment.json") for seed in (3, 4))
    assert one["split"] == other["split"] and (one["seed"], other["seed"]) == (3, 4)
    scores = [read_json(out / f"seed-{seed}" / "results.json")["rows"][0]["psnr_whole"] for seed in (3, 4)]
    assert scores[0] != scores[1]


def test_tables_hold_the_means_of_the_seeds_and_their_spread(world):
    _, out, experiment = world
    document = read_json(out / "results.json")
    each = [read_json(out / f"seed-{seed}" / "results.json")["rows"] for seed in (3, 4)]
    assert document["seeds"] == [3, 4] and len(document["rows"]) == len(each[0])
    for row, *alone in zip(document["rows"], *each, strict=True):
        assert [(one["table"], one["model"], one["region"]) for one in alone] == [
            (row["table"], row["model"], row["region"])
        ] * 2
        for score in SCORES:
            values = [one[score] for one in alone]
            if None not in values:
                assert row[score] == pytest.approx(np.mean(values), abs=1e-9)
    body = next(row for row in document["rows"] if (row["table"], row["model"], row["region"]) == ("A", "ae", "body"))
    alone = [next(r for r in rows if (r["table"], r["model"], r["region"]) == ("A", "ae", "body")) for rows in each]
    spread = float(np.std([one["psnr_hidden"] for one in alone], ddof=1))
    assert experiment.spread_of_seeds(body, "psnr_hidden") == pytest.approx(spread)
    tables = (out / "tables.md").read_text()
    assert "means of the seeds 3, 4" in tables and f"(seeds ± {spread:.2f})" in tables


def test_the_same_command_again_trains_and_scores_nothing(world):
    store, out, _ = world
    kept = [*out.rglob("checkpoint.pt"), *out.rglob("scores.json")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    table = (out / "tables.md").read_text()
    run_with_seeds([store.path], out, BUDGET, (3, 4), device="cpu", models=MODELS, console=quiet())
    assert {path: path.stat().st_mtime_ns for path in kept} == before and len(before) == 16
    assert (out / "tables.md").read_text() == table


def test_the_folder_of_one_seed_is_refused_and_left_as_it_is(world, tmp_path):
    store, out, _ = world
    shutil.copytree(out / "seed-3", tmp_path / "one")
    with pytest.raises(UsageError, match="several seeds, found the experiment of one"):
        run_with_seeds([store.path], tmp_path / "one", BUDGET, (3, 4), device="cpu", models=MODELS)
    assert not (tmp_path / "one" / "seed-3").exists()


def test_a_number_that_one_seed_lacks_is_the_mean_of_the_others():
    row = {"model": "m", "volume_id": "v", "group": "g", "region": "body", "mae_hu": 4.0, "patch_rmse_hu": [1.0, 2.0]}
    other = {**row, "mae_hu": math.nan, "patch_rmse_hu": [3.0, 6.0]}
    third = {**row, "mae_hu": 8.0, "patch_rmse_hu": None}
    (mean,) = mean_volume_rows([row, other, third])
    assert mean == {**row, "mae_hu": 6.0, "patch_rmse_hu": [2.0, 4.0]}
    assert len(mean_volume_rows([row, {**row, "group_by": "column", "group_name": "inner"}])) == 2
    (none,) = mean_volume_rows([{**row, "mae_hu": math.nan}, {**row, "mae_hu": None}])
    assert json.loads(json.dumps(none))["mae_hu"] is None
