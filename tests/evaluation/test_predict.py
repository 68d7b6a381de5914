"""Predictors on the crops that a run validates on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.runs import save_run

from maesil.data.crops import Crop
from maesil.data.split import Split
from maesil.evaluation.naive import MeanBaseline
from maesil.evaluation.predict import psnr_of_crops
from maesil.models.masking import make_masks
from maesil.training.checkpoint import load_run


def test_the_psnr_of_crops_is_over_hidden_patches_that_are_valid_as_a_whole(tmp_path):
    run, rng = load_run(save_run(tmp_path / "run", Split(("a",), ()))), np.random.default_rng(0)
    crops, squared, weights = [], 0.0, 0.0
    predictor = MeanBaseline((-1000.0, 1000.0), 8)
    for number in range(3):
        hu = rng.integers(-1024, 1500, (32, 32, 32)).astype(np.int16)
        hu[:16] //= 4  # so that weights matter
        valid = rng.choice(np.array([0, 254, 255], np.uint8), (4, 4, 4))
        crops.append(Crop("", (0, 0, 0), hu, valid, valid))
        masks = make_masks(run.config.mask, (4, 4, 4), [number])
        inside = torch.from_numpy(np.kron(valid == 255, np.ones((8, 8, 8), bool)))[None]
        predicted = predictor.predict_hu(torch.from_numpy(hu)[None], masks, inside)[0].numpy()
        error = (predicted - hu.clip(-1000, 1000).astype(float)) ** 2
        for token in masks.ids_masked[0].tolist():
            z, y, x = np.unravel_index(token, (4, 4, 4))
            patch = error[8 * z : 8 * z + 8, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            squared += patch.mean() if valid[z, y, x] == 255 else 0.0
            weights += valid[z, y, x] == 255
    found = psnr_of_crops(predictor, crops, run)
    assert found == pytest.approx(10 * np.log10(2000**2 * weights / squared), abs=1e-3)
