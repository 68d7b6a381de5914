"""What a report says of patients: each counts once, however many volumes, regions and groups their rows are of."""

from __future__ import annotations

import numpy as np
import pytest
from support.runs import save_run

from maesil.data.split import Split
from maesil.evaluation.cost import Cost
from maesil.evaluation.report import Experiment, Trained
from maesil.training.checkpoint import load_run

SCORES = {
    "maesil": {("a", "a1"): 20.0, ("a", "a2"): 24.0, ("b", "b1"): 30.0, ("c", "c1"): 27.0},
    "ae": {("a", "a1"): 19.0, ("a", "a2"): 23.0, ("b", "b1"): 25.0, ("c", "c1"): 27.0},
}


def test_patients_count_once_and_only_by_rows_of_the_region(tmp_path):
    run, split = load_run(save_run(tmp_path / "run", Split(("t",), ()))), Split(("t",), (), ("a", "b", "c"))
    runs = []
    for model, scores in SCORES.items():
        rows = []
        for (group, volume), psnr in scores.items():
            row = {"model": model, "group": group, "volume_id": volume, "region": "body", "psnr_hidden": psnr}
            rows += [row, {**row, "region": "whole", "psnr_hidden": 99.0}]
            rows += [{**row, "group_by": "hu_class", "group_name": "lung", "psnr_hidden": -99.0}]
        runs.append(Trained("A", run, rows, Cost(1, 1.0, 1.0), 1.0, (tmp_path,)))
    experiment = Experiment("tiny", (0,), "", split, tuple(runs), [], {}, {}, tmp_path)
    row = {"table": "A", "model": "ae", "region": "body"}
    assert experiment.spread(row, "psnr_hidden") == pytest.approx(np.std([21, 25, 27], ddof=1))
    found = experiment.difference(row, "psnr_hidden")
    assert (found.mean, found.patients) == (pytest.approx((1 + 5 + 0) / 3), 3)
